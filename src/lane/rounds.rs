//! The samples of a response: each with what comes before it and after it.

use super::*;

impl Driver<'_> {
    /// Samples, and samples again for as long as there is input for it.
    /// The first sample is afforded already.
    pub(super) async fn rounds(&mut self, mut open: Open) {
        let (conclusion, events) = loop {
            let mut events = Vec::new();
            let ready = match self.sample(&mut open, &mut events).await {
                Ok(Went::Nowhere) => continue,
                Ok(Went::To(Next::Finish(end))) => break (Conclusion::Finish(end), events),
                Ok(Went::To(Next::Sample)) => {
                    self.goes_on(&open, events).await;
                    Ok(Ready::Input)
                }
                Ok(Went::To(Next::Await)) => {
                    self.awaits(&mut open, events).await;
                    self.awaiting(&mut open).await
                }
                Ok(Went::Back) => self.awaiting(&mut open).await,
                Err(conclusion) => break (conclusion, events),
            };
            let prepared = match ready {
                Ok(Ready::Prompt) => Ok(()),
                Ok(Ready::Input) => self.prepare(&mut open),
                Err(conclusion) => Err(conclusion),
            };
            if let Err(conclusion) = prepared {
                break (conclusion, Vec::new());
            }
        };
        match conclusion {
            Conclusion::Finish(end) => self.finish(open, end, events).await,
            Conclusion::Failed(error) => self.failed(open, error, events).await,
            Conclusion::Refused(error) => self.refused(open, error).await,
            Conclusion::Cancelled => self.cancelled(&open).await,
        }
    }

    /// One sample, and what comes after it. Its last events are left in `events`.
    pub(super) async fn sample(
        &mut self,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<Went, Conclusion> {
        let begun = Instant::now();
        let before = (open.usage(), open.calls_made());
        let ended = self.round(open, events).await;
        if matches!(ended, Err(Broken::Unbegun(_))) {
            if let Some(before) = self.withheld.presumed() {
                // Another model takes over for what has passed.
                self.purse.abandon();
                open.unbegin_round();
                self.unpresume(open, *before);
                return Ok(Went::Back);
            }
            if self.hand_over(open) {
                return self.handed_over(open, events).await;
            }
        }
        self.settle_sample(open, begun, before);
        let mut ended = self.settle(ended, open, events).await;
        if let Ok(end @ (RoundEnd::Stop | RoundEnd::Boundary)) = ended
            && !self.unadmitted.is_empty()
        {
            let end = open.close_round(end, events);
            self.tell(open, std::mem::take(events), None).await;
            let admitted = self.all_admitted(open).await;
            ended = admitted.map_or_else(Stop::into_round, |()| Ok(end));
        }
        match ended {
            Ok(end) => Ok(Went::To(open.end_round(end, events))),
            Err(broken) => self.broken(broken, open),
        }
    }

    /// Another model has taken over: it samples, if that is afforded.
    pub(super) async fn handed_over(
        &mut self,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<Went, Conclusion> {
        self.clock.mark(|timing| &mut timing.rendered);
        let verdicts = open.take_verdicts().collect();
        self.send(verdicts).await;
        if self.afford(open).is_ok() {
            return Ok(Went::Nowhere);
        }
        match self.settle(Ok(RoundEnd::Spent), open, events).await {
            Err(broken @ (Broken::Cancelled | Broken::Refused(_) | Broken::Presumed(_))) => {
                self.broken(broken, open)
            }
            Ok(_) | Err(Broken::Failed(_) | Broken::Unbegun(_)) => {
                let end = End::Incomplete(IncompleteReason::Budget);
                Err(Conclusion::Finish(end))
            }
        }
    }

    /// What comes after a sample that came to no end.
    pub(super) fn broken(&mut self, broken: Broken, open: &mut Open) -> Result<Went, Conclusion> {
        match broken {
            Broken::Cancelled => Err(Conclusion::Cancelled),
            Broken::Failed(error) | Broken::Unbegun(error) => Err(Conclusion::Failed(error)),
            Broken::Refused(error) => Err(Conclusion::Refused(error)),
            Broken::Presumed(before) => {
                self.unpresume(open, *before);
                Ok(Went::Back)
            }
        }
    }

    /// Input came while it sampled: the next sample follows at once.
    pub(super) async fn goes_on(&mut self, open: &Open, events: Vec<Event>) {
        self.delivers(open);
        self.send(events).await;
        if self.earlier.len() == EARLIER_SAMPLES_MAX {
            self.earlier.remove(0);
        }
        self.earlier.push(open.sample_report(self.clock.timing));
        self.clock = Clock::new(Instant::now());
    }

    /// The outputs of its calls are awaited, and the client is told.
    pub(super) async fn awaits(&mut self, open: &mut Open, mut events: Vec<Event>) {
        self.slot = None;
        self.delivers(open);
        let mut done = self.done(open, Status::AwaitingInput);
        self.charge(self.counts(open), &mut done);
        events.extend(self.found());
        events.push(done);
        open.told();
        self.send(events).await;
    }

    /// The prompt of the next sample, which is afforded then.
    pub(super) fn prepare(&mut self, open: &mut Open) -> Result<(), Conclusion> {
        match open.prepare(true) {
            Ok(()) if self.afford(open).is_err() => Err(Conclusion::Finish(End::Incomplete(
                IncompleteReason::Budget,
            ))),
            Ok(()) => {
                self.clock.mark(|timing| &mut timing.rendered);
                Ok(())
            }
            // What was sampled and sent is kept: it can be continued once it fits.
            Err(error) if error.code == Code::ContextLengthExceeded => {
                let end = End::Incomplete(IncompleteReason::MaxOutputTokens);
                Err(Conclusion::Finish(end))
            }
            Err(error) => Err(Conclusion::Failed(error)),
        }
    }

    /// The model that is to take over from this one takes over, if there is one and it can. Where not,
    /// the response fails as it would have without.
    pub(super) fn hand_over(&mut self, open: &mut Open) -> bool {
        let model = open.model().clone();
        let fallback = model.fallback.as_deref();
        let Some(next) = fallback.and_then(|name| self.shared.models.named(name)) else {
            return false;
        };
        tracing::warn!(
            from = &*model.name,
            to = &*next.name,
            "another model takes over"
        );
        tracing::Span::current().record("model", &*next.name);
        // The other one may have other budgets.
        let purse = self.shared.wallet.begin(&next.name);
        let policy = self.policy(&next);
        match open.hand_over((next, policy), &self.shared.heads) {
            Ok(()) => {
                self.purse.hand_over(purse);
                if let Some(meter) = &mut self.meter {
                    meter.serve(served(open));
                }
                let inquiries = open.inquiries_again();
                self.ask_about_input(inquiries, open);
                true
            }
            Err(error) => {
                tracing::warn!(code = error.code.as_str(), "it cannot");
                false
            }
        }
    }

    /// One sample. Its last events are left in `events`.
    pub(super) async fn round(
        &mut self,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<RoundEnd, Broken> {
        let shared = self.shared;
        let backend = open.model().backend.clone();
        let begun = Instant::now();
        let prompt = open.begin_round();
        let mut chunks: Chunks = backend.sample(prompt);
        self.clock.mark(|timing| &mut timing.dispatched);
        // Waited for all the while, once.
        let stops = self.stops.clone();
        let mut stopped = std::pin::pin!(stops.stopped());
        let time_left = self.purse.time_left_ms(now_ms());
        let mut time_over = std::pin::pin!(sleep_for(time_left));
        let mut first = true;
        let hold_bytes_max = open.policy().map_or(0, Policy::hold_bytes_max);
        loop {
            // Room for the events comes first: a client that does not read is not sampled for.
            let mut permit = shared.out.try_reserve();
            while permit.is_none() && !self.deaf {
                tokio::select! {
                    biased;
                    stop = &mut stopped => return stop.into_round(),
                    control = receive(&mut self.controls) => self.control(control, open).await,
                    room = shared.out.reserve() => match room {
                        Ok(room) => permit = Some(room),
                        Err(Gone) if self.stays => self.deaf = true,
                        Err(Gone) => return Ok(RoundEnd::Interrupted),
                    },
                }
            }
            let chunk = loop {
                tokio::select! {
                    biased;
                    stop = &mut stopped => return stop.into_round(),
                    () = &mut time_over => return Ok(RoundEnd::Spent),
                    control = receive(&mut self.controls) => self.control(control, open).await,
                    judged = self.withheld.judged() => {
                        if let Some(end) = self.take(judged, open, events).await? {
                            return Ok(end);
                        }
                    }
                    judgement = admissible(&mut self.unadmitted), if self.presumed == 0 => {
                        self.admit(judgement, open).await;
                    }
                    chunk = chunks.next(), if !self.withheld.full(hold_bytes_max) => break chunk,
                }
            };
            let chunk = match chunk {
                Some(Ok(chunk)) => chunk,
                Some(Err(error)) => {
                    let elsewhere = !matches!(error, BackendError::Refused { .. });
                    let broken = match first && elsewhere {
                        true => Broken::Unbegun,
                        false => Broken::Failed,
                    };
                    return Err(broken(from_backend(error)));
                }
                None => {
                    let why = "the backend ended the sample without saying why";
                    return Err(Broken::Failed(Error::new(Code::BackendError, why)));
                }
            };
            if first && (!chunk.tokens.is_empty() || chunk.told.is_some()) {
                first = false;
                self.clock.mark(|timing| &mut timing.first_token);
            }
            let sampled = open.usage().output_tokens;
            let end = open.chunk(chunk, events);
            self.sampled_tokens = open.usage().output_tokens.into();
            let sampled = open.usage().output_tokens - sampled;
            let free = self.purse.is_free();
            let spent = !free && {
                let took_ms = millis(begun.elapsed());
                let paid = self.purse.output(sampled.into(), took_ms, now_ms());
                paid.is_err()
            };
            let counts = self.counts(open);
            if let Some(meter) = &mut self.meter {
                meter.checkpoint(counts);
            }
            let end = match end.map_err(Broken::Failed)? {
                // The limit of tokens was the budget's, if it has no more.
                None | Some(RoundEnd::Length) if spent => Some(RoundEnd::Spent),
                end => end,
            };
            if let Some(end) = end {
                self.clock.mark(|timing| &mut timing.last_token);
                return Ok(end);
            }
            self.tell(open, std::mem::take(events), permit).await;
            self.ask_about_output(open, false).await;
        }
    }

    /// Holds the response for the outputs of its calls, then waits for a slot to sample in.
    /// Commands are taken all the while.
    pub(super) async fn awaiting(&mut self, open: &mut Open) -> Result<Ready, Conclusion> {
        let interrupted = End::Incomplete(IncompleteReason::Interrupted);
        let until = Instant::now() + self.shared.limits.held_time_max;
        let mut slot = std::pin::pin!(self.shared.slots.clone().acquire_owned());
        let mut prefill = None;
        loop {
            let next = open.next();
            if let Next::Finish(end) = next
                && self.unadmitted.is_empty()
            {
                return Err(Conclusion::Finish(end));
            }
            tokio::select! {
                biased;
                stop = self.stops.stopped() => return Err(match stop {
                    Stop::Cancelled => Conclusion::Cancelled,
                    Stop::Interrupted | Stop::Gone => Conclusion::Finish(interrupted),
                }),
                control = receive(&mut self.controls) => {
                    match &control {
                        Some(control) => self.clock = Clock::new(control.read_at),
                        // Nobody can answer the calls any more.
                        None if next == Next::Await && self.shared.ends.gone.is_cancelled() => {
                            return Err(Conclusion::Finish(interrupted));
                        }
                        None => {}
                    }
                    self.control(control, open).await;
                    if self.presume(open) {
                        return Ok(Ready::Prompt);
                    }
                    self.clock.mark(|timing| &mut timing.checked);
                    if self.unadmitted.is_empty() {
                        prefill = prefill_ahead(open);
                    }
                }
                judgement = admissible(&mut self.unadmitted) => {
                    self.admit(judgement, open).await;
                    self.clock.mark(|timing| &mut timing.checked);
                    prefill = prefill_ahead(open);
                }
                slot = &mut slot, if next == Next::Sample => {
                    self.slot = slot.ok();
                    self.clock.mark(|timing| &mut timing.started);
                    return Ok(Ready::Input);
                }
                () = prefilled(&mut prefill) => {}
                () = tokio::time::sleep_until(until), if next == Next::Await => {
                    return Err(Conclusion::Finish(interrupted));
                }
            }
        }
    }

    /// Lets the backend prepare its cache, for no longer than the response lives.
    pub(super) async fn warm_up(&self, open: &Open) -> Option<Stop> {
        let mut prefill = prefill_of(open, open.prompt());
        prefill.as_ref()?;
        tokio::select! {
            biased;
            stop = self.stops.stopped() => Some(stop),
            () = prefilled(&mut prefill) => None,
        }
    }
}

/// What came of a sample.
pub(super) enum Went {
    /// It has ended, and this comes next.
    To(Next),
    /// Nothing was sampled: another model has taken over, and is ready.
    Nowhere,
    /// Its input was taken back, and the response awaits it.
    Back,
}

/// What is there for the next sample.
pub(super) enum Ready {
    /// Its input.
    Input,
    /// Its prompt, which is afforded.
    Prompt,
}

/// How a response ends.
pub(super) enum Conclusion {
    Finish(End),
    Failed(Error),
    Refused(Error),
    Cancelled,
}

/// Why a sample came to no end.
pub(super) enum Broken {
    Cancelled,
    Failed(Error),
    /// The same before anything was sampled: another model may take over.
    Unbegun(Error),
    /// Input does not pass.
    Refused(Error),
    /// Input that was presumed to pass does not.
    Presumed(Box<Before>),
}

impl Stop {
    fn into_round(self) -> Result<RoundEnd, Broken> {
        match self {
            Self::Cancelled => Err(Broken::Cancelled),
            Self::Interrupted | Self::Gone => Ok(RoundEnd::Interrupted),
        }
    }
}

/// The next command, or `None` once none can come; then it is not asked again.
pub(super) async fn receive(controls: &mut Option<mpsc::Receiver<Control>>) -> Option<Control> {
    match controls {
        Some(controls) => controls.recv().await,
        None => std::future::pending().await,
    }
}

/// The work of a backend that prepares its cache. Dropping it stops that work.
pub(super) type Prefill = BoxFuture<'static, Result<(), BackendError>>;

/// Starts to prepare the backend's cache for the prompt, where the backend can.
pub(super) fn prefill_of(open: &Open, prompt: Prompt) -> Option<Prefill> {
    let backend = &open.model().backend;
    let prefills = backend.capabilities().prefill;
    prefills.then(|| backend.prefill(prompt))
}

/// Starts to prepare it for input that came early, while other input is awaited.
pub(super) fn prefill_ahead(open: &Open) -> Option<Prefill> {
    let awaits = open.next() == Next::Await;
    let prompt = awaits.then(|| open.prompt_ahead()).flatten()?;
    prefill_of(open, prompt)
}

/// The end of the work, once. Never where there is none.
pub(super) async fn prefilled(prefill: &mut Option<Prefill>) {
    let Some(work) = prefill else {
        return std::future::pending().await;
    };
    if let Err(error) = work.await {
        tracing::info!(%error, "the prompt could not be prefilled");
    }
    *prefill = None;
}

pub(super) fn from_backend(error: BackendError) -> Error {
    let message = error.to_string();
    match error {
        BackendError::Unavailable { retry_after, .. } => Error {
            retry_after,
            ..Error::new(Code::BackendUnavailable, message)
        },
        BackendError::Refused { .. } => Error::new(Code::InvalidRequest, message),
        BackendError::Failed { .. } => Error::new(Code::BackendError, message),
    }
}

/// Never where there is no limit.
pub(super) async fn sleep_for(millis: Option<u64>) {
    match millis {
        Some(millis) => tokio::time::sleep(Duration::from_millis(millis)).await,
        None => std::future::pending().await,
    }
}
