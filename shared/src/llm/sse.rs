//! Reads an event stream piece by piece, however it was cut into pieces on its way.
//!
//! Format: WHATWG HTML, "Server-sent events", 9.2.5 and 9.2.6
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>).
//! `id` and `retry` are passed by: they are for clients that connect again, which nobody does with a
//! completion.

/// An event larger than this ends the stream: a picture in one delta fits, a runaway server does not.
pub const MAX_EVENT_BYTES: usize = 8 * 1024 * 1024;

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// One event, as it was dispatched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The field `event`; empty where there was none.
    pub name: String,
    /// The fields `data`, joined by line feeds. Bytes that are no UTF-8 are replaced by U+FFFD.
    pub data: String,
}

/// The event is larger than [`MAX_EVENT_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event of more than {MAX_EVENT_BYTES} bytes")]
pub struct TooLarge;

/// The state between two pieces. What is left in it when the stream ends was no whole event and is
/// dropped with it, as the standard has it.
#[derive(Debug, Default)]
pub struct Parser {
    /// The line so far, without its end.
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed that follows belongs to it.
    after_return: bool,
    /// A first line was read, so no byte order mark can follow.
    begun: bool,
    name: String,
    /// Ends in a line feed if there was any.
    data: String,
}

impl Parser {
    /// Takes the next piece and returns the events that it completes, in order.
    ///
    /// # Errors
    /// [`TooLarge`], after which the stream cannot be read on.
    pub fn feed(&mut self, mut piece: &[u8]) -> Result<Vec<Event>, TooLarge> {
        let mut events = Vec::new();
        if self.after_return && !piece.is_empty() {
            self.after_return = false;
            piece = piece.strip_prefix(b"\n").unwrap_or(piece);
        }
        while let Some(end) = piece.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let (line, rest) = piece.split_at(end);
            self.extend(line)?;
            piece = match rest {
                b"\r" => {
                    self.after_return = true;
                    &[]
                }
                [b'\r', b'\n', rest @ ..] | [_, rest @ ..] => rest,
                [] => rest,
            };
            events.extend(self.end_line());
        }
        self.extend(piece)?;
        Ok(events)
    }

    fn extend(&mut self, bytes: &[u8]) -> Result<(), TooLarge> {
        if self.line.len() + self.data.len() + bytes.len() > MAX_EVENT_BYTES {
            return Err(TooLarge);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    /// Works a whole line; an empty one gives the event that it ends.
    fn end_line(&mut self) -> Option<Event> {
        let mut line = std::mem::take(&mut self.line);
        if !std::mem::replace(&mut self.begun, true) && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        let event = if line.is_empty() { self.dispatch() } else { self.field(&line) };
        // Its room is kept for the next line.
        line.clear();
        self.line = line;
        event
    }

    /// A comment is a field without a name. Lines can be decoded one by one: no byte of a longer
    /// UTF-8 sequence is a line's end.
    fn field(&mut self, line: &[u8]) -> Option<Event> {
        let (name, value) = match line.iter().position(|byte| *byte == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, [].as_slice()),
        };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match name {
            b"data" => {
                self.data.push_str(&String::from_utf8_lossy(value));
                self.data.push('\n');
            }
            b"event" => self.name = String::from_utf8_lossy(value).into_owned(),
            _ => {}
        }
        None
    }

    fn dispatch(&mut self) -> Option<Event> {
        let (name, mut data) = (std::mem::take(&mut self.name), std::mem::take(&mut self.data));
        // An event without the field `data` is none.
        data.pop()?;
        Some(Event { name, data })
    }
}

impl Event {
    /// Appends the event as it goes over the wire.
    pub fn write(&self, out: &mut Vec<u8>) {
        if !self.name.is_empty() {
            out.extend_from_slice(b"event: ");
            out.extend_from_slice(self.name.as_bytes());
            out.push(b'\n');
        }
        for line in self.data.split('\n') {
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(line.as_bytes());
            out.push(b'\n');
        }
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&[u8]]) -> Vec<(String, String)> {
        let mut parser = Parser::default();
        let events = pieces.iter().flat_map(|piece| parser.feed(piece).unwrap());
        events.map(|event| (event.name, event.data)).collect()
    }

    #[track_caller]
    fn check(stream: impl AsRef<[u8]>, expected: &[(&str, &str)]) {
        let stream = stream.as_ref();
        let expected: Vec<_> = expected.iter().map(|(name, data)| ((*name).to_owned(), (*data).to_owned())).collect();
        assert_eq!(read(&[stream]), expected);
        for first in 0..=stream.len() {
            let (a, b) = stream.split_at(first);
            assert_eq!(read(&[a, b]), expected, "cut at {first}");
            assert_eq!(read(&[a, &[], b]), expected, "cut at {first}, and nothing between");
        }
        let bytes: Vec<_> = stream.chunks(1).collect();
        assert_eq!(read(&bytes), expected, "byte by byte");
    }

    const COMPLETION: &str = concat!(
        r#"data: {"choices":[{"delta":{"content":"naïve 🩺"}}]}"#,
        "\n\n",
        r#"data: {"choices":[],"usage":{"prompt_tokens":1}}"#,
        "\n\ndata: [DONE]\n\n"
    );

    #[test]
    fn events_are_read_wherever_the_stream_is_cut() {
        let expected = [
            ("", r#"{"choices":[{"delta":{"content":"naïve 🩺"}}]}"#),
            ("", r#"{"choices":[],"usage":{"prompt_tokens":1}}"#),
            ("", "[DONE]"),
        ];
        check(COMPLETION, &expected);
        check(COMPLETION.replace('\n', "\r\n"), &expected);
        check(COMPLETION.replace('\n', "\r"), &expected);
    }

    #[test]
    fn the_ends_of_lines_may_be_of_any_kind_and_mixed() {
        check("data: a\r\ndata: b\rdata: c\n\r\ndata: d\n\rdata: e\r\r", &[("", "a\nb\nc"), ("", "d"), ("", "e")]);
    }

    #[test]
    fn the_examples_of_the_standard_are_read_as_it_says() {
        check("data: YHOO\ndata: +2\ndata: 10\n\n", &[("", "YHOO\n+2\n10")]);
        check(
            ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
            &[("", "first event"), ("", "second event"), ("", " third event")],
        );
        // The last block has no empty line behind it.
        check("data\n\ndata\ndata\n\ndata:", &[("", ""), ("", "\n")]);
        check("data:test\n\ndata: test\n\n", &[("", "test"), ("", "test")]);
    }

    #[test]
    fn comments_names_and_unknown_fields_are_told_apart() {
        check(": ping\n:\n\nevent: error\nretry: 10\ndatax: no\n data: no\ndata: {}\n\n", &[("error", "{}")]);
        check("event: lonely\n\ndata: a\n\n", &[("", "a")]);
        check("event: one\nevent: two\ndata: a: b\n\n", &[("two", "a: b")]);
    }

    #[test]
    fn a_byte_order_mark_is_skipped_once() {
        check("\u{feff}data: a\n\n", &[("", "a")]);
        check("\u{feff}\u{feff}data: a\n\ndata: b\n\n", &[("", "b")]);
        check("data: a\n\n\u{feff}data: b\n\n", &[("", "a")]);
    }

    #[test]
    fn bytes_that_are_no_utf_8_are_replaced_and_the_rest_is_read() {
        check(b"data: a\xffb\n\ndata: \xf0\x9f\xa9\n\ndata: c\n\n", &[("", "a\u{fffd}b"), ("", "\u{fffd}"), ("", "c")]);
    }

    #[test]
    fn what_is_not_ended_is_dropped() {
        check("data: a\n\ndata: b\n", &[("", "a")]);
        check("data: a\n\ndata: [DO", &[("", "a")]);
        check("", &[]);
    }

    #[test]
    fn an_event_has_a_largest_size_in_one_line_or_in_many() {
        let mut parser = Parser::default();
        let half = vec![b'x'; MAX_EVENT_BYTES / 2];
        assert_eq!(parser.feed(&half), Ok(vec![]));
        assert_eq!(parser.feed(&half), Ok(vec![]));
        assert_eq!(parser.feed(b"x"), Err(TooLarge));
        let mut parser = Parser::default();
        let lines = b"data: 0123456789\n".repeat(MAX_EVENT_BYTES / 11 + 1);
        assert_eq!(parser.feed(&lines), Err(TooLarge));
    }

    #[test]
    fn what_is_written_is_read_as_the_same() {
        for (name, data) in [("", "a"), ("", ""), ("error", "{\n  \"a\": 1\n}"), ("x", "\n"), ("", " a")] {
            let event = Event { name: name.to_owned(), data: data.to_owned() };
            let mut bytes = Vec::new();
            event.write(&mut bytes);
            assert_eq!(Parser::default().feed(&bytes), Ok(vec![event]));
        }
    }
}
