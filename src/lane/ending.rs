//! How a response ends, and what it is charged: the record, the client's last event, and what is refused.

use super::*;

impl Driver<'_> {
    /// Commits the response, charges it, hands it to the store's queue, and only then tells the client.
    pub(super) async fn finish(&mut self, open: Open, end: End, mut events: Vec<Event>) {
        self.delivers(&open);
        let mut done = self.done(&open, end.into());
        let counts = self.counts(&open);
        let committed = open.commit(end.into(), &self.shared.held);
        self.charge(counts, &mut done);
        self.shared.archive.keep(&committed).await;
        events.extend(self.found());
        events.push(done);
        self.send(events).await;
    }

    /// The backend broke. What was sampled and handed out before is kept, so that the client can
    /// go on from it instead of running its tools again.
    pub(super) async fn failed(&mut self, mut open: Open, error: Error, mut events: Vec<Event>) {
        tracing::info!(code = error.code.as_str(), "response failed");
        open.end_round(RoundEnd::Interrupted, &mut events);
        let status = Status::Failed(error);
        self.delivers(&open);
        let mut done = self.done(&open, status.clone());
        let counts = self.counts(&open);
        let committed = open
            .has_output()
            .then(|| open.commit(status, &self.shared.held));
        self.charge(counts, &mut done);
        if let Some(committed) = committed {
            self.shared.archive.keep(&committed).await;
        }
        events.push(done);
        self.send(events).await;
    }

    /// Reserves what the sample needs that begins next, and limits its answer to what is left.
    pub(super) fn afford(&mut self, open: &mut Open) -> Result<(), Spent> {
        let afforded = self.purse.sample(open.prompt_tokens().into(), now_ms())?;
        open.afford(afforded.map(|left| u32::try_from(left).unwrap_or(u32::MAX)));
        Ok(())
    }

    /// The sample has ended that began then, when so much had been used.
    pub(super) fn settle_sample(&mut self, open: &Open, begun: Instant, before: (Usage, u64)) {
        let (usage, calls) = (open.usage(), open.calls_made());
        let since = |of: fn(&Usage) -> u32| of(&usage).saturating_sub(of(&before.0)).into();
        let sampled = Sampled {
            took_ms: millis(begun.elapsed()),
            calls: calls - before.1,
            input_tokens: since(|it| it.input_tokens),
            cached_tokens: since(|it| it.cached_tokens),
            output_tokens: since(|it| it.output_tokens),
        };
        self.purse.settle_sample(sampled, now_ms());
    }

    /// Room for the record of the response, without which it must not be sampled.
    pub(super) async fn reserve(&self, open: &Open, asked: Arc<str>) -> Result<Meter, Unbegun> {
        let begin = self
            .shared
            .account
            .begin(self.id.clone(), asked, served(open));
        tokio::select! {
            biased;
            stop = self.stops.stopped() => Err(stop.into()),
            meter = begin => meter.map_err(|full| unrecorded(&full).into()),
        }
    }

    /// What was used so far.
    pub(super) fn counts(&self, open: &Open) -> Counts {
        Counts {
            calls: open.calls_made(),
            sample_ms: self.purse.sample_ms(),
            cost_nanos: self.purse.cost_nanos(),
            ..Counts::new(open.usage(), open.reused_tokens(), self.delivered_tokens)
        }
    }

    /// The events of all that was sampled are on their way, where somebody is there to get them.
    pub(super) fn delivers(&mut self, open: &Open) {
        self.left(open.usage().output_tokens.into());
    }

    /// The events of so many sampled tokens are on their way.
    pub(super) fn left(&mut self, sampled: u64) {
        if !self.deaf && !self.shared.ends.gone.is_cancelled() {
            self.delivered_tokens = sampled;
        }
    }

    /// What was sampled is charged, on every way out, before the client hears of the end: it gets
    /// the receipt.
    pub(super) fn charge(&mut self, counts: Counts, done: &mut Event) {
        let (Event::Done(done), Some(meter)) = (done, self.meter.take()) else {
            return;
        };
        done.receipt = Some(match Settlement::new(&done.status, done.finish) {
            Some(settlement) => meter.settle(settlement, counts),
            None => {
                let receipt = meter.receipt(counts);
                self.meter = Some(meter);
                receipt
            }
        });
    }

    pub(super) async fn cancelled(&mut self, open: &Open) {
        let mut done = self.done(open, Status::Cancelled);
        self.charge(self.counts(open), &mut done);
        self.answer(vec![done], self.cancelled_by()).await;
    }

    /// Stopped before it began.
    pub(super) async fn stopped_early(&mut self, stop: Stop) {
        self.withheld.give_up();
        match stop {
            Stop::Cancelled => self.cancelled_early().await,
            Stop::Interrupted => {
                let why = "the stream closed before the turn of this create came";
                self.refuse(Error::new(Code::Draining, why)).await;
            }
            Stop::Gone => {}
        }
    }

    /// Cancelled before it began: there is nothing to charge.
    pub(super) async fn cancelled_early(&mut self) {
        self.clock.mark(|timing| &mut timing.done);
        let done = Event::Done(Box::new(crate::event::Done {
            status: Status::Cancelled,
            model: None,
            finish: None,
            call_ids: Vec::new(),
            output_item_ids: Vec::new(),
            usage: Usage::default(),
            prompt: crate::event::PromptReport::default(),
            timing: self.clock.timing,
            output: Vec::new(),
            earlier: Vec::new(),
            receipt: None,
        }));
        self.answer(vec![done], self.cancelled_by()).await;
    }

    pub(super) fn cancelled_by(&self) -> RequestId {
        let asked = self.stops.cancel.asked_by();
        asked
            .filter(|id| !id.as_str().is_empty())
            .unwrap_or(&self.request_id)
            .clone()
    }

    pub(super) fn done(&mut self, open: &Open, status: Status) -> Event {
        self.clock.mark(|timing| &mut timing.done);
        open.done(status, self.clock.timing, std::mem::take(&mut self.earlier))
    }

    /// A create that was refused: no response exists.
    pub(super) async fn refuse(&mut self, error: Error) {
        tracing::debug!(code = error.code.as_str(), "create refused");
        let batch = Batch {
            lane: self.lane.clone(),
            response_id: None,
            request_id: self.request_id.clone(),
            events: [Event::Error(Box::new(error))].into(),
        };
        // A client that is gone needs no answer.
        let _ = self.shared.out.send(batch).await;
    }

    pub(super) async fn send(&mut self, events: Vec<Event>) {
        self.answer(events, self.request_id.clone()).await;
    }

    /// Events leave, or wait with those before them.
    pub(super) async fn answer(&mut self, events: Vec<Event>, request_id: RequestId) {
        match self.withheld.is_idle() {
            true => self.deliver(events, request_id).await,
            false => self.withhold(events, request_id, false),
        }
    }

    pub(super) async fn deliver(&mut self, events: Vec<Event>, request_id: RequestId) {
        if self.deaf || events.is_empty() {
            return;
        }
        self.told = true;
        let batch = self.batch(events, request_id);
        if self.shared.out.send(batch).await.is_err() {
            self.deaf = true;
        }
    }

    pub(super) fn batch(&self, events: Vec<Event>, request_id: RequestId) -> Batch {
        Batch {
            lane: self.lane.clone(),
            response_id: Some(self.id.clone()),
            request_id,
            events: events.into(),
        }
    }

    /// The response has ended: commands that reached it too late are refused.
    pub(super) async fn close(&mut self) {
        self.withheld.give_up();
        let mut late = self.unadmitted();
        if let Some(mut controls) = self.controls.take() {
            controls.close();
            while let Some(control) = controls.recv().await {
                late.push(control);
            }
        }
        for control in late {
            let command = match control.what {
                What::Append(_) => "append",
                What::Done => "done",
            };
            let error = Event::Error(Box::new(not_open(&self.id, command)));
            self.answer(vec![error], control.request_id).await;
        }
    }
}
