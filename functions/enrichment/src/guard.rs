//! Promise 4: what an LLM wrote is shown only where it names no class outside the record, gives no
//! number, does not reassure, diagnose or advise, and is plain English.
//!
//! What may be said is listed, not what may not: `words.txt` holds neutral words about skin, colour,
//! shape and time, `phrases.txt` the only surroundings in which a two-faced word is harmless. Any
//! other word refuses the text, be it another language, an invented class, a drug or a misspelling.
//! `denied.txt` names what can still be composed of these words. The guard refuses when in doubt: a
//! refusal costs a nicer sentence; the template takes its place.

use std::collections::HashSet;
use std::sync::LazyLock;

/// Length of an explanation in bytes.
const LENGTH: std::ops::RangeInclusive<usize> = 40..=1200;
/// Shorter sentences ("Melanocytic naevus it is.") answer a question that nobody may answer here.
const MIN_SENTENCE_WORDS: usize = 4;
/// Stands for a class of the record; the text's own words are lower case.
const NAME: &str = "NAME";
/// A comparison or another subject follows: what was pointed at before is not what comes now.
const TURNS: &[&str] =
    &["while", "whereas", "but", "although", "unlike", "than", "from", "similar", "different", "look", "resemble"];
/// What a `?` in a pattern does not stand for.
const PREPOSITIONS: &[&str] = &["and", "by", "for", "from", "in", "of", "on", "or", "to", "with"];

static WORDS: LazyLock<HashSet<&str>> = LazyLock::new(|| include_str!("guard/words.txt").lines().collect());
/// What a sentence may begin with, besides a name. A bare verb would be an order.
static OPENERS: LazyLock<HashSet<&str>> = LazyLock::new(|| include_str!("guard/openers.txt").lines().collect());
static PHRASES: LazyLock<Vec<(Option<&str>, Pattern)>> = LazyLock::new(|| {
    let parse = |line: &'static str| match line.split_once(": ") {
        Some((class, phrase)) => (Some(class), pattern(phrase)),
        None => (None, pattern(line)),
    };
    include_str!("guard/phrases.txt").lines().map(parse).collect()
});
static DENIED: LazyLock<Vec<(Refusal, Pattern)>> =
    LazyLock::new(|| by_reason(include_str!("guard/denied.txt")).map(|(why, line)| (why, pattern(line))).collect());
static REASONS: LazyLock<Vec<(Refusal, Vec<&str>)>> = LazyLock::new(|| {
    by_reason(include_str!("guard/reasons.txt")).map(|(why, stems)| (why, stems.split(' ').collect())).collect()
});

/// Why a text is not shown; the name goes to the record and the log, the text does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Length,
    Characters,
    /// A sentence too short or begun like an order, or a beginning that leaves open what it speaks of.
    Form,
    /// A word that the vocabulary lacks and that hints at no other reason.
    Vocabulary,
    Number,
    ForeignClass,
    Reassurance,
    Diagnosis,
    Advice,
}

impl Refusal {
    /// The code in the description's `fallback`.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Length => "llm_text_length",
            Self::Characters => "llm_text_characters",
            Self::Form => "llm_text_form",
            Self::Vocabulary => "llm_text_vocabulary",
            Self::Number => "llm_text_number",
            Self::ForeignClass => "llm_text_foreign_class",
            Self::Reassurance => "llm_text_reassures",
            Self::Diagnosis => "llm_text_diagnoses",
            Self::Advice => "llm_text_advises",
        }
    }
}

/// Whether an explanation may be shown. `names` are the classes that the record speaks of.
///
/// # Errors
/// The first rule that it breaks.
pub fn check(text: &str, names: &[&str]) -> Result<(), Refusal> {
    if !LENGTH.contains(&text.len()) {
        return Err(Refusal::Length);
    }
    if text.bytes().any(|byte| byte.is_ascii_digit()) {
        return Err(Refusal::Number);
    }
    let is_plain = |byte: u8| byte.is_ascii_alphabetic() || b" .,;:'-()\n".contains(&byte);
    if !text.bytes().all(is_plain) {
        return Err(Refusal::Characters);
    }
    let text = text.to_ascii_lowercase();
    let names: Vec<String> = names.iter().map(|name| name.to_ascii_lowercase()).collect();
    let sentences: Vec<Vec<&str>> =
        text.split(['.', ';']).map(|sentence| with_names(&tokens(sentence), &names)).collect();
    let unknown: Vec<&str> = sentences.iter().flat_map(|sentence| unknown(sentence, &names)).collect();
    if !unknown.is_empty() {
        return Err(unknown.iter().find_map(|word| reason(word)).unwrap_or(Refusal::Vocabulary));
    }
    let spoken: Vec<Vec<&str>> =
        sentences.iter().map(|sentence| spoken(sentence)).filter(|it| !it.is_empty()).collect();
    for sentence in &spoken {
        if let Some((refusal, _)) = DENIED.iter().find(|(_, pattern)| is_found(pattern, sentence)) {
            return Err(*refusal);
        }
    }
    let is_opener = |word: &str| word == NAME || OPENERS.contains(word);
    // "It" and "the lesion" mean a class, and not what is on the photo, only after one was named.
    if !spoken.first().is_some_and(|first| first.contains(&NAME))
        || spoken.iter().any(|sentence| sentence.len() < MIN_SENTENCE_WORDS || !is_opener(sentence[0]))
    {
        return Err(Refusal::Form);
    }
    Ok(())
}

/// Words and commas. A hyphenated word is judged in its parts, and so is a word that hyphens hide.
fn tokens(sentence: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    for (i, part) in sentence.split([',', ':', '(', ')']).enumerate() {
        if i > 0 {
            tokens.push(",");
        }
        for word in part.split_ascii_whitespace() {
            let word = word.strip_suffix("'s").unwrap_or(word).trim_matches('\'');
            if word == "-" {
                tokens.push(",");
            }
            tokens.extend(word.split('-').filter(|part| !part.is_empty()));
        }
    }
    tokens
}

/// Puts `NAME` where the record's class names stand whole, plural forms included.
fn with_names<'a>(words: &[&'a str], names: &[String]) -> Vec<&'a str> {
    let mut names: Vec<Vec<&str>> = names.iter().map(|name| spoken(&tokens(name))).collect();
    // The longest first, or a short name inside a longer one leaves a stump.
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    let mut named = Vec::new();
    let mut at = 0;
    while let Some(word) = words.get(at) {
        let is_here = |name: &&Vec<&str>| {
            let here = words.get(at..at + name.len()).unwrap_or_default();
            !name.is_empty() && here.len() == name.len() && here.iter().zip(name.iter()).all(|(a, b)| is_form(a, b))
        };
        let name = names.iter().find(is_here);
        named.push(name.map_or(*word, |_| NAME));
        at += name.map_or(1, Vec::len);
    }
    named
}

/// Whether `word` is `noun` or its plural: naevi, keratoses, carcinomas.
fn is_form(word: &str, noun: &str) -> bool {
    let plural = |ending: &str, plural: &str| {
        noun.strip_suffix(ending).is_some_and(|stem| word.strip_prefix(stem).is_some_and(|rest| rest == plural))
    };
    word == noun || plural("", "s") || plural("us", "i") || plural("is", "es")
}

/// The words of a sentence that are neither in the vocabulary nor in one of the allowed phrases.
fn unknown<'a>(sentence: &[&'a str], names: &[String]) -> Vec<&'a str> {
    let mut is_known: Vec<bool> =
        sentence.iter().map(|word| [NAME, ","].contains(word) || WORDS.contains(word)).collect();
    for (class, phrase) in PHRASES.iter() {
        if class.is_some_and(|class| !names.iter().any(|name| name.contains(class))) {
            continue;
        }
        for at in 0..sentence.len() {
            if let Some(length) = length_at(phrase, &sentence[at..]) {
                is_known[at..at + length].fill(true);
            }
        }
    }
    sentence.iter().zip(is_known).filter(|(_, known)| !known).map(|(word, _)| *word).collect()
}

/// What an unknown word hints at. It decides the code only; the text is refused anyway.
fn reason(word: &str) -> Option<Refusal> {
    // Short stems begin too many words.
    let has_stem = |stem: &&str| if stem.len() < 4 { word == *stem } else { word.starts_with(*stem) };
    REASONS.iter().find(|(_, stems)| stems.iter().any(has_stem)).map(|(refusal, _)| *refusal)
}

/// A sentence without commas, and names without their article: what the denied patterns are
/// compared with. "The former" is a name here.
fn spoken<'a>(sentence: &[&'a str]) -> Vec<&'a str> {
    let mut spoken: Vec<&str> = Vec::new();
    for word in sentence.iter().filter(|word| **word != ",") {
        let last = spoken.last().copied().unwrap_or_default();
        let is_name = *word == NAME || last == "the" && ["first", "second", "former", "latter"].contains(word);
        if is_name && ["a", "an", "the"].contains(&last) {
            spoken.pop();
        }
        spoken.push(if is_name { NAME } else { word });
    }
    spoken
}

/// A part of a pattern. `a|b` is one of these words, `...` any words, `..` any words before a turn,
/// `?` at most one word and no preposition.
enum Part {
    Words(Vec<&'static str>),
    Any,
    Clause,
    Optional,
}
type Pattern = Vec<Part>;

fn pattern(line: &'static str) -> Pattern {
    let part = |part: &'static str| match part {
        "..." => Part::Any,
        ".." => Part::Clause,
        "?" => Part::Optional,
        words => Part::Words(words.split('|').collect()),
    };
    line.split(' ').map(part).collect()
}

fn is_found(pattern: &[Part], words: &[&str]) -> bool {
    (0..words.len()).any(|at| length_at(pattern, &words[at..]).is_some())
}

/// How many words at the beginning of `words` the pattern takes.
fn length_at(pattern: &[Part], words: &[&str]) -> Option<usize> {
    let Some((part, rest)) = pattern.split_first() else { return Some(0) };
    let after = |skipped: usize| length_at(rest, words.get(skipped..)?).map(|length| skipped + length);
    match part {
        Part::Words(choices) => words.first().filter(|word| choices.contains(word)).and_then(|_| after(1)),
        Part::Any => (0..words.len()).find_map(after),
        Part::Clause => {
            let turn = words.iter().position(|word| TURNS.contains(word)).unwrap_or(words.len());
            (0..=turn).find_map(after)
        }
        Part::Optional => {
            after(0).or_else(|| words.first().filter(|word| !PREPOSITIONS.contains(word)).and_then(|_| after(1)))
        }
    }
}

/// Lines of the form `reason: rest`.
fn by_reason(lines: &'static str) -> impl Iterator<Item = (Refusal, &'static str)> {
    lines.lines().filter_map(|line| {
        let (reason, rest) = line.split_once(": ")?;
        let refusal = match reason {
            "number" => Refusal::Number,
            "class" => Refusal::ForeignClass,
            "reassures" => Refusal::Reassurance,
            "diagnoses" => Refusal::Diagnosis,
            "advises" => Refusal::Advice,
            _ => return None,
        };
        Some((refusal, rest))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const NAMES: &[&str] = &["Melanocytic naevus", "Benign keratosis"];

    fn judged(text: &str) -> Result<(), Refusal> {
        check(text, NAMES)
    }

    #[test]
    fn no_adversarial_text_gets_through() {
        let texts = include_str!("../fixtures/adversarial.txt").lines().filter_map(|line| line.split_once('\t'));
        let mut refused: BTreeMap<&str, usize> = BTreeMap::new();
        let mut shown = Vec::new();
        for (category, text) in texts {
            match judged(text) {
                Err(_) => *refused.entry(category).or_default() += 1,
                Ok(()) => shown.push(text),
            }
        }
        println!("refused: {refused:?}");
        assert!(shown.is_empty(), "{} shown:\n{}", shown.len(), shown.join("\n"));
        assert!(refused.values().sum::<usize>() >= 200 && refused.len() == 7, "{refused:?}");
    }

    #[test]
    fn every_honest_text_gets_through() {
        let texts: Vec<_> = include_str!("../fixtures/honest.txt").lines().collect();
        let refused: Vec<_> =
            texts.iter().filter_map(|text| Some(format!("{:?}: {text}", judged(text).err()?))).collect();
        assert!(refused.is_empty(), "{} refused:\n{}", refused.len(), refused.join("\n"));
        assert!(texts.len() >= 50);
    }

    #[test]
    fn a_refusal_is_named_after_what_the_text_does() {
        for (text, refusal) in [
            (
                "A melanocytic naevus is a growth of pigment cells and there is nothing to worry about with it.",
                Refusal::Reassurance,
            ),
            ("A melanocytic naevus is a growth of pigment cells that they sell in Rome.", Refusal::Vocabulary),
            ("A melanocytic naevus is a growth of pigment cells that can be treated at any age.", Refusal::Advice),
            ("A melanocytic naevus is a growth of pigment cells that ninety adults have.", Refusal::Number),
            ("A melanocytic naevus is a growth of pigment cells, and so is a melanoma.", Refusal::ForeignClass),
            ("A melanocytic naevus is made of pigment cells. It is a benign keratosis.", Refusal::Diagnosis),
            ("The lesion is made of pigment cells and has an even brown colour.", Refusal::Form),
            ("A melanocytic naevus is a growth \u{2014} one of pigment cells.", Refusal::Characters),
            ("Melanocytic naevus.", Refusal::Length),
        ] {
            assert_eq!(judged(text), Err(refusal), "{text}");
        }
    }

    #[test]
    fn only_the_names_of_the_record_are_taken_for_names() {
        let text = "Melanocytic naevi and BENIGN KERATOSES can both have an even brown colour.";
        assert_eq!(judged(text), Ok(()));
        assert_eq!(check(text, &["Melanocytic naevus"]), Err(Refusal::Reassurance));
        assert_eq!(
            judged("A melanocytic naevus is benign, keratosis is rough and has a sharp border."),
            Err(Refusal::Reassurance)
        );
        let vessels = "A vascular lesion is made up of small blood vessels and is often red or purple.";
        assert_eq!(check(vessels, &["Vascular lesion"]), Ok(()));
        assert!(check(vessels, NAMES).is_err());
    }

    #[test]
    fn a_word_broken_by_hyphens_blanks_or_lines_is_refused() {
        for word in ["harm-less", "harm less", "h a r m l e s s", "per-fectly\nfine", "be-nign", "mo\nle"] {
            let text = format!("A melanocytic naevus is a growth of pigment cells, and it is {word} in its look.");
            assert!(judged(&text).is_err(), "{text}");
        }
        assert_eq!(judged("A melanocytic naevus is often well-defined,\ndome-shaped and skin-coloured."), Ok(()));
    }

    #[test]
    fn every_line_of_the_word_lists_is_read() {
        assert_eq!(DENIED.len(), include_str!("guard/denied.txt").lines().count());
        assert_eq!(REASONS.len(), include_str!("guard/reasons.txt").lines().count());
    }
}
