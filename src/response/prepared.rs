//! The prompts of a response: how what is staged becomes one, and what a sample is asked for with it.

use super::*;

impl Open {
    /// Renders and tokenises what is staged; from here on it is part of the prompt.
    ///
    /// # Errors
    ///
    /// `context_length_exceeded`, or `invalid_request` where the template refuses.
    pub fn prepare(&mut self, generation_prompt: bool) -> Result<(), Error> {
        let mut batch = std::mem::take(&mut self.staged);
        if self.open_calls.is_empty() {
            batch.append(&mut self.steering);
        }
        self.admit_input(batch);
        let previous = self.rope.clone();
        let ahead = self.ahead.take();
        let mut rendered = self.render(generation_prompt, ahead.as_ref())?;
        let limit = self.model.tokens_max() as usize;
        while rendered.rope.len_tokens() >= limit {
            let tokens = rendered.rope.len_tokens();
            if self.settings.truncation != Some(Truncation::Auto)
                || !self.hide(&rendered.rope, limit)
            {
                return Err(too_long(tokens, limit).at("create.input"));
            }
            self.rerender = Some(RerenderReason::Truncation);
            rendered = self.render(generation_prompt, None)?;
        }
        self.rope = rendered.rope;
        self.resume = rendered.resume;
        self.constrain()?;
        self.prompt_tokens = self.rope.len_tokens();
        self.prompt_entries = self.entries.len();
        self.report = self.report_on(&previous, rendered.encoded_tokens);
        Ok(())
    }

    /// Finds out what the next sample keeps to, and whether the backend can make it.
    pub(super) fn constrain(&mut self) -> Result<(), Error> {
        let tail = self.rope.tail(ROUND_TAIL_BYTES);
        let grammar = constraint::grammar(&self.settings, &self.model.artifacts, &tail)?;
        if self.grammar.as_deref() != grammar.as_ref() {
            self.grammar = grammar.map(Arc::new);
        }
        if let Some(grammar) = &self.grammar {
            let checked = self.model.backend.check(&self.tenant, grammar);
            checked.map_err(|error| constraint::refused(&self.settings, &error))?;
        }
        Ok(())
    }

    pub(super) fn render(
        &self,
        generation_prompt: bool,
        ahead: Option<&Tail>,
    ) -> Result<render::Rendered, Error> {
        let artifacts = &self.model.artifacts;
        let seen = Seen::new(&self.entries, self.visible);
        let past = self.past(&self.rope);
        render::render(artifacts, &self.head, seen, generation_prompt, past, ahead)
    }

    /// What a rendering goes on from; the rope holds the last prompt at least.
    pub(super) fn past<'a>(&'a self, rope: &'a Rope) -> Past<'a> {
        Past {
            rope,
            resume: self.resume.as_ref(),
        }
    }

    pub(super) fn report_on(&mut self, previous: &Rope, encoded: usize) -> PromptReport {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let reused = self.rope.common_tokens(previous);
        let rerender = self.rerender.take();
        let mut report = PromptReport {
            tokens: count(self.rope.len_tokens()),
            encoded_tokens: count(encoded),
            sampled_tokens: count(self.rope.sampled_tokens()),
            truncated_items: self.visible.hidden_items,
            ..PromptReport::default()
        };
        match std::mem::replace(&mut self.head_tokens, HeadTokens::Past) {
            HeadTokens::Cached => {
                report.head_tokens_cached = count(reused);
                report.extends_previous = true;
            }
            HeadTokens::Encoded(head) => {
                report.encoded_tokens += count(head);
                report.extends_previous = true;
            }
            HeadTokens::OtherModel { dropped, encoded } => {
                report.encoded_tokens += count(encoded);
                report.dropped_tokens = count(dropped);
                report.rerender = Some(RerenderReason::Model);
            }
            HeadTokens::Past => {
                report.reused_tokens = count(reused);
                report.dropped_tokens = count(previous.len_tokens() - reused);
                report.extends_previous = reused == previous.len_tokens();
                if !report.extends_previous {
                    report.rerender = Some(rerender.unwrap_or(RerenderReason::Template));
                }
            }
        }
        report
    }

    /// Puts input behind the conversation.
    pub(super) fn admit_input(&mut self, batch: Vec<ValidItem>) {
        if !batch.is_empty() {
            self.input.extend(batch.iter().map(|new| new.item.clone()));
            self.admit(batch);
        }
    }

    /// Puts a batch of items behind the conversation.
    pub(super) fn admit(&mut self, batch: Vec<ValidItem>) {
        let entries = render::entries(&batch, &self.model.artifacts);
        let compacts = entries
            .iter()
            .any(|entry| entry.speaker == Speaker::Summary);
        self.entries.extend(entries);
        self.batches.push(batch);
        if compacts {
            self.visible = Visible::from_summary(&self.entries);
            self.rerender = Some(RerenderReason::Truncation);
        }
    }

    /// Takes the oldest exchanges out of the prompt, so that about a quarter of the context gets
    /// free and the next steps need not do it again. False when nothing more can go.
    pub(super) fn hide(&mut self, rendered: &Rope, limit: usize) -> bool {
        let all = &self.entries;
        let surplus = rendered.len_tokens() - limit * 3 / 4;
        // Text of messages takes about as many tokens a byte as the whole prompt does.
        let surplus_bytes = surplus * rendered.len_bytes() / rendered.len_tokens().max(1);
        let mut freed = 0;
        let mut from = None;
        let seen = || all.iter().skip(self.visible.from);
        for (at, (hidden, next)) in (self.visible.from + 1..).zip(seen().zip(seen().skip(1))) {
            freed += hidden.bytes + MESSAGE_BYTES;
            if next.speaker != Speaker::Tool {
                from = Some((at, next.speaker));
                if freed >= surplus_bytes {
                    break;
                }
            }
        }
        let Some((from, speaker)) = from else {
            return false;
        };
        let client = |entry: &Entry| matches!(entry.speaker, Speaker::Client | Speaker::Summary);
        let pinned = match speaker {
            Speaker::Client | Speaker::Tool | Speaker::Summary => None,
            Speaker::Model => (0..from).rev().find(|at| all.get(*at).is_some_and(client)),
        };
        self.visible = Visible::new(all, from, pinned);
        true
    }

    /// The prompt, for a sample that now begins.
    pub fn begin_round(&mut self) -> Prompt {
        let chat = self.chat();
        let prompt = Prompt {
            chat,
            ..self.prompt()
        };
        self.usage.samples += 1;
        self.sampled_before = self.usage.output_tokens;
        self.usage.input_tokens += self.report.tokens;
        self.reused_tokens += self.report.had_before();
        self.round = Some(Round::new(self));
        prompt
    }

    /// The conversation as messages, where the backend reads them. Those of the past are made once.
    pub(super) fn chat(&mut self) -> Option<Chat> {
        if !self.model.backend.capabilities().reads_messages {
            return None;
        }
        for batch in &self.batches[self.chat.len()..] {
            self.chat.push(render::messages(batch));
        }
        let past: Vec<&Committed> = self.parent.iter().flat_map(|it| it.chain()).collect();
        let masked = &self.checked.masked;
        let anew: Vec<ChatMessage> = match masked.is_empty() {
            true => Vec::new(),
            false => {
                let past = past.iter().rev().flat_map(|node| &node.batches);
                let all = past.chain(&self.batches).map(|batch| masked.apply(batch));
                all.flat_map(|batch| render::messages(&batch)).collect()
            }
        };
        let kept = past.iter().rev().flat_map(|node| node.chat());
        let all: Vec<&ChatMessage> = match masked.is_empty() {
            true => kept.chain(self.chat.iter().flatten()).collect(),
            false => anew.iter().collect(),
        };
        let Visible { from, pinned, .. } = self.visible;
        let pinned = pinned.and_then(|at| all.get(at));
        let seen = pinned.into_iter().chain(all.iter().skip(from));
        Some(Chat {
            settings: self.settings.clone(),
            messages: seen.map(|message| (*message).clone()).collect(),
        })
    }

    /// The prompt as it stands, its tokens alone.
    #[must_use]
    pub fn prompt(&self) -> Prompt {
        let settings = &self.settings;
        let defaults = &self.model.artifacts.sampling;
        let tools = settings.callable().map(|tool| tool.name.clone()).collect();
        Prompt {
            response_id: self.id.clone(),
            tenant: self.tenant.clone(),
            affinity: self.affinity(),
            tokens: self.rope.clone(),
            recent: self.recent(),
            chat: None,
            sampling: Sampling {
                max_tokens: self.max_tokens(),
                end_tokens: self.model.artifacts.end_tokens.clone(),
                temperature: settings.temperature.unwrap_or(defaults.temperature),
                top_p: settings.top_p.unwrap_or(defaults.top_p),
                top_k: settings.top_k.unwrap_or(defaults.top_k),
                seed: settings.seed,
                presence_penalty: settings.presence_penalty.unwrap_or(0.0),
                frequency_penalty: settings.frequency_penalty.unwrap_or(0.0),
                logit_bias: settings.logit_bias.clone().unwrap_or_default(),
                top_logprobs: settings.top_logprobs,
                grammar: self.grammar.clone(),
                tools,
            },
        }
    }

    pub(super) fn max_tokens(&self) -> u32 {
        let asked = self
            .settings
            .max_output_tokens
            .unwrap_or(self.model.output_tokens_max)
            .min(self.model.output_tokens_max);
        let room = self.model.tokens_max().saturating_sub(self.report.tokens);
        let afforded = self.afforded.unwrap_or(u32::MAX);
        asked
            .saturating_sub(self.usage.output_tokens)
            .min(room)
            .min(afforded)
    }

    /// Tokens of the prompt that was prepared last.
    #[must_use]
    pub fn prompt_tokens(&self) -> u32 {
        self.report.tokens
    }

    /// A budget leaves so many tokens for the next sample. `None`: none limits it.
    pub fn afford(&mut self, tokens: Option<u32>) {
        self.afforded = tokens;
    }

    /// Conversations that share a prefix share it: the root's id, or what the client chose.
    pub(super) fn affinity(&self) -> Arc<str> {
        if let Some(key) = &self.settings.prompt_cache_key {
            return key.clone();
        }
        self.parent
            .as_ref()
            .map_or_else(|| self.id.as_str().into(), |parent| parent.affinity.clone())
    }

    /// The items since the last message of the user, for backends that read them.
    pub(super) fn recent(&self) -> Vec<Arc<Item>> {
        if !self.model.backend.capabilities().reads_items {
            return Vec::new();
        }
        let past = self
            .parent
            .iter()
            .flat_map(|parent| parent.chain())
            .flat_map(|node| node.batches.iter().rev());
        let batches = self.batches.iter().rev().chain(past);
        let mut items = Vec::new();
        for new in batches.flat_map(|batch| batch.iter().rev()) {
            items.push(self.checked.masked.apply_to(new).item);
            if matches!(
                new.item.body,
                Body::Message {
                    role: Role::User,
                    ..
                }
            ) {
                break;
            }
        }
        items.reverse();
        items
    }
}
