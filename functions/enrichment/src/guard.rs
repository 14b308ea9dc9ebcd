//! Promise 4: what an LLM wrote is shown only where it names no class outside the record, gives no
//! number, does not reassure, diagnose or advise, and is plain English.
//!
//! The guard refuses when in doubt. A refusal costs a nicer sentence; the template takes its place.

/// Length of an explanation in bytes.
const LENGTH: std::ops::RangeInclusive<usize> = 40..=1200;
/// Share of words that plain English text spends on its smallest words. Other languages in Latin
/// letters stay far below.
const MIN_FUNCTION_WORDS: f64 = 0.22;

/// Why a text is not shown; the name goes to the record and the log, the text does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Length,
    Characters,
    Language,
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
            Self::Language => "llm_text_language",
            Self::Number => "llm_text_number",
            Self::ForeignClass => "llm_text_foreign_class",
            Self::Reassurance => "llm_text_reassures",
            Self::Diagnosis => "llm_text_diagnoses",
            Self::Advice => "llm_text_advises",
        }
    }
}

const FUNCTION_WORDS: &[&str] = &[
    "a", "an", "and", "are", "as", "at", "be", "by", "can", "for", "from", "has", "have", "in", "is", "it", "may",
    "of", "often", "on", "or", "such", "that", "the", "their", "these", "they", "this", "to", "usually", "which",
    "with",
];

/// Words that are numbers. `one` is left to the phrases below: "one of the classes" is no number.
const NUMBER_WORDS: &[&str] = &[
    "zero",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
    "hundred",
    "hundreds",
    "thousand",
    "thousands",
    "million",
    "dozen",
    "half",
    "halves",
    "third",
    "thirds",
    "quarter",
    "quarters",
    "fifth",
    "tenth",
    "percent",
    "percentage",
    "twice",
    "double",
    "majority",
    "probability",
    "odds",
    "chance",
    "chances",
];

/// Beginnings of words that name a disease or a kind of growth. What the record itself names is
/// taken out of the text first.
const CLASS_STEMS: &[&str] = &[
    "abscess",
    "acne",
    "adeno",
    "akiec",
    "angio",
    "bcc",
    "birthmark",
    "blister",
    "bowen",
    "bkl",
    "cancer",
    "carcino",
    "cyst",
    "dermatitis",
    "dermatofib",
    "dermatosis",
    "eczema",
    "fibroma",
    "freckle",
    "fung",
    "haemang",
    "hemang",
    "herpes",
    "infect",
    "kaposi",
    "keloid",
    "kerato",
    "lentig",
    "lipoma",
    "lupus",
    "lymphom",
    "melanocyt",
    "melanom",
    "merkel",
    "metasta",
    "mole",
    "mycosis",
    "naev",
    "neopla",
    "neuro",
    "nevi",
    "nevus",
    "paget",
    "papillom",
    "psoria",
    "ringworm",
    "rosacea",
    "sarcom",
    "scab",
    "scc",
    "seborr",
    "syphil",
    "tag",
    "tumor",
    "tumour",
    "ulcer",
    "vascul",
    "verruc",
    "vitiligo",
    "wart",
    "xanthom",
];

const REASSURANCE: &[&str] = &[
    "safe",
    "safely",
    "harmless",
    "benign",
    "innocent",
    "innocuous",
    "worry",
    "worries",
    "worried",
    "worrying",
    "worrisome",
    "concern",
    "concerns",
    "concerned",
    "concerning",
    "reassure",
    "reassuring",
    "reassured",
    "reassurance",
    "relax",
    "calm",
    "fine",
    "okay",
    "ok",
    "healthy",
    "normal",
    "nothing",
    "unlikely",
    "rarely",
    "rare",
    "low",
    "minor",
    "trivial",
    "serious",
    "dangerous",
    "danger",
    "threat",
    "threatening",
    "risk",
    "risks",
    "risky",
    "alarm",
    "alarming",
    "afraid",
    "fear",
    "panic",
    "relief",
    "lucky",
    "good",
    "great",
    "well",
    "cosmetic",
    "problem",
    "problems",
    "issue",
    "spread",
    "spreads",
    "curable",
    "deadly",
    "fatal",
    "lethal",
    "life",
    "death",
    "malignant",
    "malignancy",
    "aggressive",
];

const DIAGNOSIS: &[&str] = &[
    "you",
    "your",
    "yours",
    "yourself",
    "patient",
    "diagnose",
    "diagnosed",
    "diagnosis",
    "diagnostic",
    "confirm",
    "confirms",
    "confirmed",
    "certain",
    "certainly",
    "definite",
    "definitely",
    "clearly",
    "undoubtedly",
    "surely",
    "proves",
    "proven",
    "suffer",
    "suffers",
    "suffering",
    "likely",
    "probably",
    "most",
    "suggests",
    "indicates",
    "conclude",
    "conclusion",
    "verdict",
    "result",
    "photo",
    "picture",
    "image",
    "doctor",
    "i",
    "we",
    "my",
    "our",
];

const ADVICE: &[&str] = &[
    "should",
    "must",
    "ought",
    "need",
    "needs",
    "needed",
    "recommend",
    "recommended",
    "recommendation",
    "advise",
    "advised",
    "advice",
    "treat",
    "treats",
    "treated",
    "treatable",
    "treatment",
    "treatments",
    "therapy",
    "therapies",
    "cream",
    "creams",
    "ointment",
    "lotion",
    "surgery",
    "surgical",
    "surgically",
    "surgeon",
    "remove",
    "removes",
    "removed",
    "removal",
    "removing",
    "excise",
    "excised",
    "excision",
    "cut",
    "biopsy",
    "biopsies",
    "test",
    "tests",
    "medicine",
    "medicines",
    "medication",
    "drug",
    "drugs",
    "prescribe",
    "prescribed",
    "prescription",
    "dose",
    "laser",
    "freeze",
    "freezing",
    "frozen",
    "cryotherapy",
    "chemotherapy",
    "radiation",
    "antibiotic",
    "antibiotics",
    "steroid",
    "steroids",
    "apply",
    "applied",
    "use",
    "take",
    "avoid",
    "wait",
    "ignore",
    "see",
    "visit",
    "consult",
    "monitor",
    "watch",
    "check",
    "vinegar",
    "oil",
    "remedy",
    "remedies",
    "heal",
    "heals",
    "cure",
    "cured",
    "cures",
    "disappear",
    "disappears",
    "vanish",
    "please",
    "click",
    "http",
    "https",
    "www",
];

/// Runs that no single word gives away.
const NUMBER_PHRASES: &[&str] =
    &["one in ", "one out ", "one to ", "one per ", "one point ", "plus one", "one hundred"];

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
    let text = without_names(&normalised(text), names);
    let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let function_words = words.iter().filter(|word| FUNCTION_WORDS.contains(word)).count();
    if (function_words as f64) < MIN_FUNCTION_WORDS * words.len() as f64 {
        return Err(Refusal::Language);
    }
    if words.iter().any(|word| NUMBER_WORDS.contains(word)) || NUMBER_PHRASES.iter().any(|phrase| text.contains(phrase))
    {
        return Err(Refusal::Number);
    }
    if words.iter().any(|word| CLASS_STEMS.iter().any(|stem| word.starts_with(stem))) {
        return Err(Refusal::ForeignClass);
    }
    for (list, refusal) in
        [(ADVICE, Refusal::Advice), (REASSURANCE, Refusal::Reassurance), (DIAGNOSIS, Refusal::Diagnosis)]
    {
        if words.iter().any(|word| list.contains(word)) {
            return Err(refusal);
        }
    }
    Ok(())
}

/// Lower case, one blank between words, one at either end, no punctuation: `"well-known"` becomes
/// `" well known "`, and a word broken by a hyphen is judged in both halves.
fn normalised(text: &str) -> String {
    let letters =
        text.chars().map(|letter| if letter.is_ascii_alphabetic() { letter.to_ascii_lowercase() } else { ' ' });
    let spaced: String = letters.collect();
    let words: Vec<&str> = spaced.split_ascii_whitespace().collect();
    format!(" {} ", words.join(" "))
}

/// Takes whole occurrences of the record's class names out, plural forms included.
fn without_names(text: &str, names: &[&str]) -> String {
    let mut names: Vec<String> = names.iter().map(|name| normalised(name).trim().to_owned()).collect();
    // The longest first, or a short name inside a longer one leaves a stump.
    names.sort_by_key(|name| std::cmp::Reverse(name.len()));
    let mut text = text.to_owned();
    for name in names.iter().filter(|name| !name.is_empty()) {
        for form in [format!(" {name}s "), format!(" {name} ")] {
            while text.contains(&form) {
                text = text.replace(&form, " ");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &[&str] = &["Melanocytic naevus", "Benign keratosis"];

    fn judged(text: &str) -> Result<(), Refusal> {
        check(text, NAMES)
    }

    #[test]
    fn an_honest_explanation_passes() {
        for text in [
            "A melanocytic naevus is a growth made of pigment cells. It is often round or oval with an even brown colour and a smooth border.",
            "Benign keratosis is a group of growths of the outer layer of the skin. They can look waxy, scaly or as if stuck on the surface.",
            "Melanocytic naevus and benign keratosis are names for growths that arise from different cells of the skin, and both can be brown in colour.",
        ] {
            assert_eq!(judged(text), Ok(()), "{text}");
        }
    }

    #[test]
    fn what_promise_4_forbids_is_refused_for_its_own_reason() {
        for (text, refusal) in [
            (
                "A melanocytic naevus is a growth of pigment cells and there is nothing to be afraid of here.",
                Refusal::Reassurance,
            ),
            (
                "A melanocytic naevus is a growth of pigment cells, and it is harmless in the long run.",
                Refusal::Reassurance,
            ),
            (
                "This is a picture of the skin and it shows that you have a melanocytic naevus on the arm.",
                Refusal::Diagnosis,
            ),
            ("A melanocytic naevus is a growth that can be treated with a cream from the pharmacy.", Refusal::Advice),
            (
                "A melanocytic naevus is a growth of pigment cells that is seen in ninety of a hundred people.",
                Refusal::Number,
            ),
            (
                "A melanocytic naevus is a growth of pigment cells with a probability of 83 on the scale.",
                Refusal::Number,
            ),
            (
                "A melanocytic naevus is a growth of pigment cells, and melanoma is the other name for it.",
                Refusal::ForeignClass,
            ),
            (
                "A melanocytic naevus is a growth of pigment cells, as is eczema of the hand or the foot.",
                Refusal::ForeignClass,
            ),
            (
                "Ein Muttermal besteht aus Pigmentzellen und hat meistens einen glatten Rand und gleichmaessige Farbe.",
                Refusal::Language,
            ),
            ("Этот невус состоит из пигментных клеток и имеет ровный край.", Refusal::Characters),
            ("Too short to be of use.", Refusal::Length),
        ] {
            assert_eq!(judged(text), Err(refusal), "{text}");
        }
    }

    #[test]
    fn a_hidden_word_is_found_behind_hyphens_and_line_breaks() {
        assert!(judged("A melanocytic naevus is a growth of pigment cells, and it is per-fectly\nharmless-looking in the light.").is_err());
    }
}
