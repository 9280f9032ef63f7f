//! The moderation endpoint of OpenAI's API, as services and gateways offer it:
//! <https://platform.openai.com/docs/api-reference/moderations>.

use std::{collections::BTreeMap, sync::Arc};

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::{ClassifierOptions, Classify, Label, Passage, Question, Unjudged, http::Endpoint};

/// Posts texts to `/moderations`. What stands before the text is put before it, as one text.
#[derive(Debug)]
pub struct Moderation {
    endpoint: Endpoint,
    model: Option<String>,
    /// Our own limit decides what is flagged, not the service's.
    by_score: bool,
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    input: String,
}

#[derive(Deserialize)]
struct Answer {
    results: Vec<Judged>,
}

#[derive(Deserialize)]
struct Judged {
    #[serde(default)]
    flagged: bool,
    /// `null` for those that the model does not know.
    #[serde(default)]
    categories: BTreeMap<String, Option<bool>>,
    #[serde(default)]
    category_scores: BTreeMap<String, Option<f32>>,
}

impl Moderation {
    /// The endpoint that these settings name.
    ///
    /// # Errors
    ///
    /// What is wrong with the URL or the key.
    pub fn new(options: &ClassifierOptions, key: Option<&str>) -> Result<Self, String> {
        Ok(Self {
            endpoint: Endpoint::new(options, "moderations", key)?,
            model: Some(options.model.clone()).filter(|it| !it.is_empty()),
            by_score: options.score_min > 0.0,
        })
    }
}

impl Classify for Moderation {
    fn classify(&self, question: Arc<Question>) -> BoxFuture<'_, Result<Vec<Label>, Unjudged>> {
        Box::pin(async move {
            let passages = question.context.iter().chain([&question.passage]);
            let texts: Vec<&str> = passages.map(|it: &Passage| &*it.text).collect();
            let body = Body {
                model: self.model.as_deref(),
                input: texts.join("\n\n"),
            };
            let Answer { results } = self.endpoint.post(&body).await?;
            if results.is_empty() {
                let why = "its answer has no results".to_owned();
                return Err(Unjudged::Refused(why));
            }
            Ok(results.into_iter().flat_map(|it| self.labels(it)).collect())
        })
    }
}

impl Moderation {
    /// With scores the classifier's own limit decides, without them what the service flags.
    fn labels(&self, judged: Judged) -> Vec<Label> {
        let Judged {
            flagged,
            categories,
            category_scores,
        } = judged;
        let label = |category: String, score| Label {
            category: category.into(),
            score,
            bytes: None,
        };
        if self.by_score && !category_scores.is_empty() {
            let scores = category_scores.into_iter();
            return scores
                .filter_map(|(category, score)| Some(label(category, Some(score?))))
                .collect();
        }
        let named = categories.into_iter().filter(|(_, it)| *it == Some(true));
        let named: Vec<Label> = named.map(|(category, _)| label(category, None)).collect();
        match named.is_empty() && flagged {
            true => vec![label("flagged".to_owned(), None)],
            false => named,
        }
    }
}
