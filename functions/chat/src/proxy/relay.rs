//! Carries an answer from the upstream to the client. What it took is settled whoever leaves.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use futures_util::FutureExt;
use reqwest::Response;
use serde_json::{Map, Value};
use shared::account::{Taken, Used};
use shared::error::{Error, OpenAiErrorBody};
use shared::llm::models::{Model, Models};
use shared::llm::sse::Event;
use tokio::sync::{mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{Interval, interval_at, sleep, timeout};

use super::answer::{self, Seen, Usage};
use super::request::{Asked, TOKEN_BYTES};
use super::told;
use super::upstream::{self, Begun, Effort, Failure, Kind, Stream};
use crate::OnLeave;

/// The longest silence of a stream towards its client.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(10);
/// A comment, which every reader of event streams passes by.
const HEARTBEAT: &[u8] = b": waiting for the model\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";
/// From the request to the last byte: what a Lambda has.
const LONGEST: Duration = Duration::from_secs(870);
/// Pieces on their way to a client that reads slowly.
const AHEAD: usize = 32;
/// Bytes of a stream that go out in one piece where they have come at once.
const AT_ONCE: usize = 64 * 1024;
/// How long a server may take to close a stream that it has ended.
const LAST_BYTES: Duration = Duration::from_secs(1);
/// How long it may take for what comes behind the last choice's end: the usage and `[DONE]`.
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// What the client is answered.
pub(crate) type Head = Result<Answer, Failure>;

pub(crate) enum Answer {
    Whole(Bytes),
    Stream(mpsc::Receiver<Bytes>),
}

/// One request on its way.
pub(crate) struct Relay {
    pub(crate) models: Arc<Models>,
    pub(crate) model: Arc<Model>,
    pub(crate) asked: Asked,
    pub(crate) on_leave: OnLeave,
    /// For what is told within a stream.
    pub(crate) request_id: String,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Complete,
    /// The client has left, and the call was ended.
    Left,
    Failed(Kind),
}

/// What came of a request.
pub(crate) struct Outcome {
    pub(crate) end: End,
    /// The model that was asked last.
    pub(crate) model: Arc<Model>,
    pub(crate) effort: Effort,
    /// As the server says.
    pub(crate) usage: Option<Usage>,
    /// Where it does not, by what was seen of the answer.
    pub(crate) guessed: Usage,
    ended: Ended,
    /// From the request to the first byte of the answer.
    pub(crate) first_byte: Option<Duration>,
    /// The client left before the end, whether or not the answer was read on.
    pub(crate) left: bool,
    /// What the client is still to get.
    held: Held,
}

/// The end of an answer. A Lambda stands still once its client has everything, so there this waits for
/// what must be done before.
#[derive(Default)]
struct Held {
    head: Option<(oneshot::Sender<Head>, Head)>,
    /// A stream ends with this.
    body: Option<mpsc::Sender<Bytes>>,
}

impl Outcome {
    /// Gives the client the rest.
    pub(crate) fn release(&mut self) {
        let Held { head, body } = std::mem::take(&mut self.held);
        drop(body);
        if let Some((sender, head)) = head {
            self.left |= sender.send(head).is_err();
        }
    }

    /// What was said on the way is not what the whole has taken.
    fn usage_was_of_a_part(&mut self) {
        if let Some(Usage { prompt_tokens, completion_tokens }) = self.usage.take() {
            let completion_tokens = completion_tokens.max(self.guessed.completion_tokens);
            self.guessed = Usage { prompt_tokens, completion_tokens };
        }
    }

    /// What it took: as the server says, or as it is guessed where nobody says, tries that may be
    /// billed included.
    pub(crate) fn used(&self) -> Used {
        let priced = |usage: Option<Usage>| {
            let Usage { prompt_tokens, completion_tokens } = usage.unwrap_or_default();
            let cost_pico = self.model.cost_pico(prompt_tokens, completion_tokens);
            Taken { prompt_tokens, completion_tokens, cost_pico }
        };
        let guessed = self.usage.is_none().then_some(self.guessed);
        Used { told: priced(self.usage), estimated: priced(guessed).and(self.effort.perhaps_billed) }
    }
}

/// What a stream has said of its end, before it breaks off or ends without a word.
#[derive(Default)]
struct Ended {
    /// The numbers of the choices that are whole.
    choices: BTreeSet<u64>,
    /// The usage stood alone, and no more of the answer has come behind it.
    usage: bool,
}

/// The way to the client.
struct Client {
    held: Held,
    head: Option<oneshot::Sender<Head>>,
    body: Option<mpsc::Sender<Bytes>>,
    on_leave: OnLeave,
    left: bool,
}

impl Client {
    /// Completes when the client has left and the call is to end with it.
    async fn cancelled(&mut self) {
        match (self.on_leave, &mut self.head, &self.body) {
            (OnLeave::Cancel, Some(head), _) => head.closed().await,
            (OnLeave::Cancel, None, Some(body)) => body.closed().await,
            _ => std::future::pending().await,
        }
        self.left = true;
    }

    /// Sends a piece of a stream, which begins with the first; whether to go on.
    async fn send(&mut self, piece: Bytes) -> bool {
        if let Some(head) = self.head.take() {
            let (sender, receiver) = mpsc::channel(AHEAD);
            self.body = Some(sender);
            self.left |= head.send(Ok(Answer::Stream(receiver))).is_err();
        }
        if let Some(body) = &self.body
            && body.send(piece).await.is_err()
        {
            self.left = true;
            self.body = None;
        }
        !self.left || self.on_leave == OnLeave::Drain
    }

    /// Tells of a failure: by a status where nothing was sent yet, else by an event.
    async fn fail(&mut self, failure: Failure, request_id: &str) {
        match self.head.take() {
            Some(head) => self.held.head = Some((head, Err(failure))),
            None => {
                self.send(error_event(&told(&failure), request_id)).await;
            }
        }
    }
}

fn error_event(error: &Error, request_id: &str) -> Bytes {
    let body = serde_json::to_string(&OpenAiErrorBody::of(error, request_id)).unwrap_or_default();
    format!("data: {body}\n\n").into()
}

impl Relay {
    /// Runs until the answer is with the client, or nobody wants it any more.
    pub(crate) async fn run(self, head: oneshot::Sender<Head>) -> Outcome {
        let started = Instant::now();
        let mut client =
            Client { held: Held::default(), head: Some(head), body: None, on_leave: self.on_leave, left: false };
        let prompt_tokens = self.asked.about_prompt_tokens();
        let mut outcome = Outcome {
            end: End::Left,
            model: Arc::clone(&self.model),
            effort: Effort::default(),
            usage: None,
            guessed: Usage::default(),
            ended: Ended::default(),
            first_byte: None,
            left: false,
            held: Held::default(),
        };
        let begun = self.begin(started + LONGEST, &mut client, &mut outcome).await;
        let first_byte = outcome.effort.first_byte.filter(|_| matches!(begun, Some(Ok(_))));
        outcome.first_byte = first_byte.map(|moment| moment.duration_since(started));
        match begun {
            // What was under way then may have been worked on.
            None => {
                outcome.effort.perhaps_billed(&self.asked);
                outcome.model = outcome.effort.model.clone().unwrap_or(outcome.model);
            }
            Some(Err(failure)) => {
                outcome.end = End::Failed(failure.kind);
                client.fail(failure, &self.request_id).await;
            }
            Some(Ok(Begun::Whole { body, usage })) => {
                outcome.end = End::Complete;
                let completion_tokens = body.len() as u64 / TOKEN_BYTES;
                outcome.guessed = Usage { prompt_tokens, completion_tokens };
                outcome.usage = usage;
                if let Some(head) = client.head.take() {
                    client.held.head = Some((head, Ok(Answer::Whole(body))));
                } else {
                    // Its client was promised a stream, and the server has none.
                    client.send(as_events(&body, self.asked.wants_usage)).await;
                }
            }
            Some(Ok(Begun::Stream(stream))) => {
                outcome.guessed.prompt_tokens = prompt_tokens;
                self.stream(stream, started + LONGEST, &mut client, &mut outcome).await;
                if outcome.end != End::Complete && !outcome.ended.usage {
                    outcome.usage_was_of_a_part();
                }
            }
        }
        outcome.left = client.left;
        outcome.held = Held { body: client.body.take(), ..client.held };
        if self.on_leave == OnLeave::Cancel {
            outcome.release();
        }
        outcome
    }

    /// Waits for the answer to begin; `None` where the client has left before. A stream's client
    /// hears heartbeats meanwhile, the first of which is its status 200.
    async fn begin(
        &self,
        deadline: Instant,
        client: &mut Client,
        outcome: &mut Outcome,
    ) -> Option<Result<Begun, Failure>> {
        let mut begin = pin!(upstream::begin(&self.models, &self.model, &self.asked, deadline, &mut outcome.effort));
        let mut beat = heartbeats();
        loop {
            tokio::select! {
                biased;
                (model, begun) = &mut begin => {
                    outcome.model = model;
                    return Some(begun);
                }
                () = client.cancelled() => return None,
                _ = beat.tick(), if self.asked.stream => {
                    if !client.send(Bytes::from_static(HEARTBEAT)).await {
                        return None;
                    }
                }
            }
        }
    }

    async fn stream(&self, stream: Stream, deadline: Instant, client: &mut Client, outcome: &mut Outcome) {
        let Stream { mut response, mut parser, mut events } = stream;
        let (mut out, mut beat) = (Vec::new(), heartbeats());
        loop {
            let end = self.take(&events, outcome, &mut out).await;
            // What has come meanwhile goes out in one piece with it.
            let further = if end.is_none() && out.len() < AT_ONCE {
                yield_now().await;
                response.chunk().now_or_never()
            } else {
                None
            };
            let is_last = !matches!(further, Some(Ok(Some(_))));
            if is_last && !out.is_empty() {
                if !client.send(std::mem::take(&mut out).into()).await {
                    return;
                }
                beat.reset();
            }
            if let Some(end) = end {
                outcome.end = end;
                if self.on_leave == OnLeave::Cancel {
                    // Whoever reads may go.
                    client.body = None;
                }
                // The connection can be used again once it is read to its end.
                let _ = timeout(LAST_BYTES, response.chunk()).await;
                return;
            }
            let piece = match further {
                Some(piece) => Some(Ok(piece.ok().flatten())),
                None => {
                    let patience = outcome.model.timeout;
                    let patience = if self.is_written(outcome) { patience.min(LAST_EVENTS) } else { patience };
                    self.next(&mut response, deadline, client, patience, &mut beat).await
                }
            };
            let failure = match piece {
                None => return,
                Some(Err(kind)) => kind,
                Some(Ok(piece)) => match piece.and_then(|piece| parser.feed(&piece).ok()) {
                    Some(next) => {
                        events = next;
                        continue;
                    }
                    None => Kind::Unavailable,
                },
            };
            // A piece that is no event stream may have come right behind others.
            if !out.is_empty() && !client.send(out.into()).await {
                return;
            }
            // Not every server says [DONE]; what it has ended it has ended.
            if outcome.ended.usage || self.is_written(outcome) {
                outcome.end = End::Complete;
                client.send(Bytes::from_static(DONE)).await;
            } else {
                outcome.end = End::Failed(failure);
                client.fail(Failure::new(failure, true), &self.request_id).await;
            }
            return;
        }
    }

    /// Whether every choice has ended.
    fn is_written(&self, outcome: &Outcome) -> bool {
        outcome.ended.choices.len() as u64 >= self.asked.choices
    }

    /// The next piece, or that there is none; `None` where the client has left. `beat` goes on from piece to piece:
    /// a server may send what no client hears of.
    async fn next(
        &self,
        response: &mut Response,
        deadline: Instant,
        client: &mut Client,
        patience: Duration,
        beat: &mut Interval,
    ) -> Option<Result<Option<Bytes>, Kind>> {
        let mut too_long = pin!(sleep(patience.min(deadline.saturating_duration_since(Instant::now()))));
        loop {
            tokio::select! {
                biased;
                piece = response.chunk() => return Some(Ok(piece.ok().flatten())),
                () = client.cancelled() => return None,
                () = &mut too_long => return Some(Err(Kind::Timeout)),
                _ = beat.tick() => {
                    if !client.send(Bytes::from_static(HEARTBEAT)).await {
                        return None;
                    }
                }
            }
        }
    }

    /// Reads what there is to know of some events, and writes those that the client gets behind `out`. Returns how
    /// the stream has ended, if it has.
    async fn take(&self, events: &[Event], outcome: &mut Outcome, out: &mut Vec<u8>) -> Option<End> {
        for event in events {
            let (mut end, seen) = (None, answer::look(event));
            // What is no part of an answer may quote the key.
            let may_quote = matches!(seen, Seen::Error | Seen::Other);
            match seen {
                Seen::Done => end = Some(End::Complete),
                Seen::UsageAlone(usage) => {
                    outcome.usage = Some(usage);
                    outcome.ended.usage = true;
                    if !self.asked.wants_usage {
                        continue;
                    }
                }
                Seen::Part { tokens, ends, usage } => {
                    outcome.guessed.completion_tokens += tokens;
                    outcome.usage = usage.or(outcome.usage);
                    outcome.ended.choices.extend(ends);
                    outcome.ended.usage &= tokens == 0;
                }
                Seen::Error => end = Some(End::Failed(Kind::Unavailable)),
                Seen::Other => {}
            }
            if may_quote && outcome.model.quotes_key(event.data.as_bytes()).await {
                let failure = Failure::new(Kind::Unavailable, true);
                end = Some(End::Failed(failure.kind));
                out.extend_from_slice(&error_event(&told(&failure), &self.request_id));
            } else {
                event.write(out);
            }
            if end.is_some() {
                return end;
            }
        }
        None
    }
}

fn heartbeats() -> Interval {
    interval_at(tokio::time::Instant::now() + HEARTBEAT_EVERY, HEARTBEAT_EVERY)
}

/// A whole answer as a stream of one chunk, in which a `message` is called `delta`, and its tool calls have numbers.
fn as_events(body: &[u8], wants_usage: bool) -> Bytes {
    let mut answer: Map<String, Value> = serde_json::from_slice(body).unwrap_or_default();
    answer.insert("object".to_owned(), "chat.completion.chunk".into());
    if !wants_usage {
        answer.remove("usage");
    }
    let choices = answer.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten();
    for choice in choices.filter_map(Value::as_object_mut) {
        let Some(mut delta) = choice.remove("message") else { continue };
        let calls = delta.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten();
        for (index, call) in calls.filter_map(Value::as_object_mut).enumerate() {
            call.insert("index".to_owned(), index.into());
        }
        choice.insert("delta".to_owned(), delta);
    }
    let event = Event { name: String::new(), data: Value::Object(answer).to_string() };
    let mut out = Vec::new();
    event.write(&mut out);
    out.extend_from_slice(DONE);
    out.into()
}
