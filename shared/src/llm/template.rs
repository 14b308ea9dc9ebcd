//! The description without an LLM, and the parts of every description that code writes: labels,
//! numbers, disclaimer.

use crate::api::DISCLAIMER;
use crate::job::{Description, DescriptionSource, Prediction, Reading};

const VERSION: &str = "template-v1";

/// A probability in words, as the LLM gets it and people read it.
#[must_use]
pub fn band(probability: f64) -> &'static str {
    match probability {
        p if p >= 0.9 => "very high",
        p if p >= 0.7 => "high",
        p if p >= 0.4 => "moderate",
        p if p >= 0.1 => "low",
        _ => "very low",
    }
}

/// The classes that a description speaks of: the first, and every other of at least 10 %.
#[must_use]
pub fn described(reading: &Reading) -> Vec<&Prediction> {
    let rest = reading.predictions.iter().skip(1).filter(|prediction| prediction.probability >= 0.1);
    reading.predictions.first().into_iter().chain(rest).take(3).collect()
}

/// The numbers in a sentence or three; always says what the malignant classes got together.
#[must_use]
pub fn facts(reading: &Reading) -> String {
    let classes = described(reading);
    let Some(first) = classes.first() else { return "The model gave no label for this photo.".to_owned() };
    let mut text = format!(
        "Of the classes that the model knows it gives the highest probability to {} ({}, {}).",
        first.name,
        percent(first.probability),
        band(first.probability)
    );
    let others: Vec<_> =
        classes[1..].iter().map(|class| format!("{} ({})", class.name, percent(class.probability))).collect();
    if !others.is_empty() {
        text.push_str(&format!(" It also considers {}.", others.join(" and ")));
    }
    let malignant: f64 =
        reading.predictions.iter().filter(|class| class.malignant).map(|class| class.probability).sum();
    text.push_str(&format!(" The classes counted as malignant or pre-malignant get {} together.", percent(malignant)));
    text
}

/// A description around `body`, which may be empty.
#[must_use]
pub fn compose(reading: &Reading, body: &str) -> String {
    let facts = facts(reading);
    let body = body.trim();
    if body.is_empty() { format!("{facts} {DISCLAIMER}") } else { format!("{facts} {body} {DISCLAIMER}") }
}

/// The whole description by template. `fallback` is the code of what kept the LLM's text out;
/// `None` where no LLM is set up.
#[must_use]
pub fn describe(reading: &Reading, fallback: Option<&str>) -> Description {
    let note = fallback.map_or("", |_| "A more detailed description could not be written this time.");
    Description {
        text: compose(reading, note),
        source: DescriptionSource::Template,
        version: VERSION.to_owned(),
        fallback: fallback.map(str::to_owned),
    }
}

/// Whole percent, but never a rounded 0 % or 100 %.
fn percent(probability: f64) -> String {
    match probability * 100.0 {
        p if p < 1.0 => "less than 1 %".to_owned(),
        p if p > 99.0 => "more than 99 %".to_owned(),
        p => format!("{p:.0} %"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(probabilities: &[(&str, f64, bool)]) -> Reading {
        let predictions = probabilities.iter().map(|(name, probability, malignant)| Prediction {
            label: (*name).to_owned(),
            name: (*name).to_owned(),
            probability: *probability,
            malignant: *malignant,
        });
        Reading { model_digest: String::new(), predictions: predictions.collect(), abstained: None, has_map: false }
    }

    #[test]
    fn a_benign_label_never_comes_without_the_malignant_share_and_the_disclaimer() {
        let text = describe(&reading(&[("nevus", 0.97, false), ("melanoma", 0.03, true)]), None).text;
        assert!(text.contains("nevus (97 %, very high)"), "{text}");
        assert!(text.contains("malignant or pre-malignant get 3 % together"), "{text}");
        assert!(text.ends_with(DISCLAIMER), "{text}");
    }

    #[test]
    fn no_probability_is_rounded_to_nothing_or_to_certainty() {
        let text = facts(&reading(&[("nevus", 0.999, false), ("melanoma", 0.001, true)]));
        assert!(text.contains("more than 99 %") && text.contains("less than 1 %"), "{text}");
    }

    #[test]
    fn a_fallback_says_so() {
        let description = describe(&reading(&[("nevus", 0.8, false)]), Some("llm_timeout"));
        assert_eq!(description.fallback.as_deref(), Some("llm_timeout"));
        assert!(description.text.contains("could not be written this time"));
    }
}
