//! Input that comes while the model samples, or before all of it is there: it is rendered ahead.

use super::*;

/// Input that no prompt holds yet, and the calls that are open with it.
pub(super) struct Waiting {
    pub(super) staged: Vec<ValidItem>,
    pub(super) steering: Vec<ValidItem>,
    pub(super) open_calls: Vec<OpenCall>,
}

/// What a rendering ahead makes of what is still to come: an answer of which no item is whole, and
/// outputs of open calls.
#[derive(Clone, Copy)]
pub(super) enum Missing {
    Absent,
    /// Something stands in its place, so that a template which refuses is known to refuse the input.
    StoodInFor,
}

pub(super) const STAND_IN: &str = "-";

pub(super) fn stand_in(body: Body) -> ValidItem {
    ValidItem {
        item: Arc::new(Item::new(body)),
        answers: None,
    }
}

impl Open {
    /// Adds input of an `append`. While a sample runs it waits for the boundary.
    ///
    /// # Errors
    ///
    /// `invalid_request`, `no_such_call` or `context_length_exceeded`; then nothing was added.
    pub fn append(&mut self, input: Vec<NewItem>, held: &Held) -> Result<Event, Error> {
        let item_ids: Vec<ItemId> = input.iter().map(|new| new.id().clone()).collect();
        let mut open_calls = self.open_calls.clone();
        let valid = validate_append(input, &mut open_calls, &|id| held.find_item(id))?;
        let names = Names {
            command: "append",
            ids: &item_ids,
        };
        let (items, found) = safety::clear(valid, self.policy.as_deref(), &names)?.into_parts();
        let (outputs, messages): (Vec<_>, Vec<_>) =
            items.into_iter().partition(|new| new.answers.is_some());
        let calls = match &self.round {
            Some(round) => round.outputs(),
            None => self.batches.last().map_or(&[][..], Vec::as_slice),
        };
        let mut staged = [self.staged.as_slice(), &outputs].concat();
        // In the order of their calls, whichever tool was first: by nothing else do some templates
        // tell outputs apart.
        staged.sort_by_key(|new| {
            let answered = new.item.answers();
            calls
                .iter()
                .position(|call| call.item.call().map(|(id, _)| id) == answered)
        });
        let steering = [self.steering.as_slice(), &messages].concat();
        let mut other = Waiting {
            staged,
            steering,
            open_calls,
        };
        self.swap(&mut other);
        match self.render_ahead() {
            Ok(tail) => self.ahead = tail.or(self.ahead.take()),
            Err(error) => {
                self.swap(&mut other);
                // What the template refuses already, for what was accepted before, is not this input's fault.
                let refused_before =
                    error.code == Code::InvalidRequest && self.render_ahead().is_err();
                if !refused_before {
                    return Err(error.at("append.input"));
                }
                self.swap(&mut other);
            }
        }
        self.verdicts.extend(found);
        let tokens = self.ahead.as_ref().map_or(0, Tail::tokens);
        Ok(Event::Appended {
            item_ids,
            queued: self.round.is_some(),
            tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
        })
    }

    pub(super) fn swap(&mut self, other: &mut Waiting) {
        std::mem::swap(&mut self.staged, &mut other.staged);
        std::mem::swap(&mut self.steering, &mut other.steering);
        std::mem::swap(&mut self.open_calls, &mut other.open_calls);
    }

    /// Renders the input that waits. `None` where the template wants more than there is.
    ///
    /// # Errors
    ///
    /// `context_length_exceeded` or `invalid_request` where no later prompt could hold the input
    /// either: what is sampled and appended until then only adds to it.
    pub(super) fn render_ahead(&self) -> Result<Option<Tail>, Error> {
        let Ok(rendered) = self.look_ahead(Missing::Absent) else {
            self.look_ahead(Missing::StoodInFor)?;
            return Ok(None);
        };
        let (tokens, limit) = (rendered.rope.len_tokens(), self.model.tokens_max() as usize);
        if tokens >= limit && self.settings.truncation != Some(Truncation::Auto) {
            return Err(too_long(tokens, limit));
        }
        Ok(Some(rendered.tail))
    }

    /// The prompt as it will be, as far as its input is there, for the backend to prefill.
    /// `None` where the backend prefills nothing, or the template wants more than there is.
    #[must_use]
    pub fn prompt_ahead(&self) -> Option<Prompt> {
        if !self.model.backend.capabilities().prefill {
            return None;
        }
        let rendered = self.look_ahead(Missing::Absent).ok()?;
        Some(Prompt {
            tokens: rendered.rope,
            ..self.prompt()
        })
    }

    /// Renders what is there now as if the sample had ended here.
    pub(super) fn look_ahead(&self, missing: Missing) -> Result<render::Rendered, Error> {
        let artifacts = &self.model.artifacts;
        let mut seen = Seen::new(&self.entries, self.visible);
        let mut rope = self.rope.clone();
        let mut input = self.staged.clone();
        let mut add = |batch: &[ValidItem]| seen.add(render::entries(batch, artifacts));
        if let Some(round) = &self.round {
            add(round.outputs());
            rope = rope.with_sampled(round.so_far());
        }
        match missing {
            Missing::Absent => {}
            Missing::StoodInFor => {
                if self
                    .round
                    .as_ref()
                    .is_some_and(|it| it.outputs().is_empty())
                {
                    add(&[stand_in(Body::Message {
                        role: Role::Assistant,
                        parts: vec![Part::InputText(STAND_IN.into())],
                    })]);
                }
                input.extend(self.open_calls.iter().map(|call| ValidItem {
                    answers: Some(call.name.clone()),
                    ..stand_in(Body::FunctionCallOutput {
                        call_id: call.call_id.clone(),
                        output: STAND_IN.into(),
                    })
                }));
            }
        }
        input.extend(self.steering.iter().cloned());
        add(&input);
        let ahead = self.ahead.as_ref();
        render::render(artifacts, &self.head, seen, true, self.past(&rope), ahead)
    }
}
