//! The classifiers' part of a response: what is asked, what waits for the answers, and what becomes of it.

use super::*;

/// A command that waits until its input has been judged, or for those before it.
pub(super) struct Unadmitted {
    /// `None`: no more will come.
    control: Option<Control>,
    /// `None`: it waits for those before it alone.
    verdict: Option<Answer>,
}

impl Unadmitted {
    /// The input of an append, and what its client calls it.
    fn append(&self) -> Option<(Vec<NewItem>, RequestId)> {
        let control = self.control.as_ref()?;
        match &control.what {
            What::Append(input) => Some((input.clone(), control.request_id.clone())),
            What::Done => None,
        }
    }
}

/// The answer to the first of them. Never where none waits.
pub(super) async fn admissible(waiting: &mut VecDeque<Unadmitted>) -> Arc<Judgement> {
    match waiting.front_mut() {
        Some(Unadmitted { verdict, .. }) => match verdict {
            Some(verdict) => verdict.await,
            None => Arc::default(),
        },
        None => std::future::pending().await,
    }
}

impl Driver<'_> {
    /// Asks, where the policy asks anybody. What is only observed is told when it is known.
    fn ask(&mut self, inquiries: Vec<Inquiry>, open: &Open) -> Option<Answer> {
        let policy = open.policy().filter(|_| !inquiries.is_empty())?;
        self.withheld.ask(inquiries, policy)
    }

    /// Asks about input that waits for nothing else: what comes now is withheld until it is judged.
    pub(super) fn ask_about_input(&mut self, inquiries: Vec<Inquiry>, open: &Open) {
        if let Some(verdict) = self.ask(inquiries, open) {
            self.withheld.wait_for(verdict, About::Input);
        }
    }

    /// Waits for what is said of the input of a create, of which nothing was told yet.
    pub(super) async fn input_judged(&mut self) -> Result<(), Unbegun> {
        while !self.withheld.is_idle() {
            let judged = tokio::select! {
                biased;
                stop = self.stops.stopped() => return Err(stop.into()),
                judged = self.withheld.judged() => judged,
            };
            let Judgement { verdicts, refusal } = &*judged.judgement;
            let verdicts = told(verdicts);
            match refusal {
                Some(error) => return Err(error.clone().into()),
                None => self.found.extend(verdicts),
            }
        }
        Ok(())
    }

    /// What was said of input before anything was told, and what was only observed and is known by now.
    pub(super) fn found(&mut self) -> Vec<Event> {
        let mut found = std::mem::take(&mut self.found);
        found.extend(verdict_events(self.withheld.observed()));
        found
    }

    /// Events of the sample: they leave, or wait for what is said of it.
    pub(super) async fn tell(
        &mut self,
        open: &mut Open,
        mut events: Vec<Event>,
        room: Option<mpsc::Permit<'_, Batch>>,
    ) {
        let unasked = open.withholds();
        if self.withheld.is_idle() && !unasked {
            events.extend(self.found());
            if events.is_empty() {
                return;
            }
            match room {
                Some(room) => {
                    room.send(self.batch(events, self.request_id.clone()));
                    self.left(self.sampled_tokens);
                }
                None => self.send(events).await,
            }
            open.output_told();
        } else if !events.is_empty() {
            self.withhold(events, self.request_id.clone(), unasked);
            if !unasked {
                open.output_told();
            }
        }
    }

    /// Events wait.
    pub(super) fn withhold(&mut self, events: Vec<Event>, request_id: RequestId, unasked: bool) {
        let sampled = self.sampled_tokens;
        let told = Told {
            request_id,
            events,
            sampled,
        };
        self.withheld.push(told, unasked);
    }

    /// Asks about output: where enough has come, or, with `all`, about what there is.
    pub(super) async fn ask_about_output(&mut self, open: &mut Open, all: bool) {
        let Some(Piece { inquiries, began }) = open.piece(all) else {
            return;
        };
        match self.ask(inquiries, open) {
            Some(verdict) => self.withheld.wait_for(verdict, About::Output(began)),
            None => {
                let told = self.withheld.let_go();
                self.release(told).await;
            }
        }
    }

    /// What waited leaves.
    async fn release(&mut self, told: Vec<Told>) {
        for Told {
            request_id,
            events,
            sampled,
        } in told
        {
            self.deliver(events, request_id).await;
            self.left(sampled);
        }
    }

    /// The oldest verdict is in. `Some`: the sample ends with it.
    pub(super) async fn take(
        &mut self,
        judged: Judged,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<Option<RoundEnd>, Broken> {
        let Judged {
            about,
            judgement,
            told,
        } = judged;
        let verdicts = match about {
            // They are told as those of each.
            About::Presumed(_) => Vec::new(),
            About::Input | About::Output(_) => self::told(&judgement.verdicts),
        };
        match (judgement.refusal.clone(), about) {
            (None, About::Input) => {
                // They stand behind what tells of the input, which is first.
                let mut told = told.into_iter();
                self.release(told.next().into_iter().collect()).await;
                self.deliver(verdicts, self.request_id.clone()).await;
                self.release(told.collect()).await;
                Ok(None)
            }
            (None, About::Output(_)) => {
                self.release(told).await;
                self.deliver(verdicts, self.request_id.clone()).await;
                Ok(None)
            }
            (None, About::Presumed(_)) => {
                let mut told = told.into_iter();
                for _ in 0..std::mem::take(&mut self.presumed) {
                    self.release(told.next().into_iter().collect()).await;
                    let admitted = self.unadmitted.pop_front();
                    if let Some((control, verdict)) =
                        admitted.and_then(|it| it.control.zip(it.verdict))
                    {
                        // It is known: all of them are.
                        let verdicts = self::told(&verdict.await.verdicts);
                        self.deliver(verdicts, control.request_id).await;
                    }
                }
                self.release(told.collect()).await;
                Ok(None)
            }
            (Some(error), About::Input) => Err(Broken::Refused(error)),
            (Some(_), About::Presumed(before)) => Err(Broken::Presumed(before)),
            (Some(_), About::Output(began)) => {
                self.withheld.give_up();
                events.clear();
                let end = open.roll_back(began, RoundEnd::Filtered, events);
                events.extend(verdicts);
                Ok(Some(end))
            }
        }
    }

    /// However the sample ended: what waits for classifiers is judged first, and nothing is kept that was not.
    pub(super) async fn settle(
        &mut self,
        ended: Result<RoundEnd, Broken>,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<RoundEnd, Broken> {
        let end = match &ended {
            Err(Broken::Cancelled) => return self.gives_up(open),
            Err(Broken::Refused(_) | Broken::Presumed(_)) => return ended,
            Ok(RoundEnd::Interrupted) => return self.interrupted(open, events),
            Ok(end) => *end,
            Err(Broken::Failed(_) | Broken::Unbegun(_)) => RoundEnd::Interrupted,
        };
        let asks_about_output = open.policy().is_some_and(|it| it.output_bytes().is_some());
        if self.withheld.is_idle() && !asks_about_output {
            return ended;
        }
        let end = open.close_round(end, events);
        self.tell(open, std::mem::take(events), None).await;
        self.ask_about_output(open, true).await;
        let stops = self.stops.clone();
        let mut stopped = std::pin::pin!(stops.stopped());
        while !self.withheld.is_idle() {
            tokio::select! {
                biased;
                stop = &mut stopped => match stop {
                    Stop::Cancelled => return self.gives_up(open),
                    Stop::Interrupted | Stop::Gone => return self.interrupted(open, events),
                },
                control = receive(&mut self.controls) => self.control(control, open).await,
                judged = self.withheld.judged() => {
                    if let Some(end) = self.take(judged, open, events).await? {
                        return Ok(end);
                    }
                }
            }
        }
        ended.map(|_| end)
    }

    /// The response is cancelled: nobody waits for what is judged.
    fn gives_up(&mut self, open: &mut Open) -> Result<RoundEnd, Broken> {
        if let Some(About::Presumed(before)) = self.withheld.give_up() {
            self.unpresume(open, *before);
        }
        Err(Broken::Cancelled)
    }

    /// Time is up: what has not been judged by now is not kept.
    fn interrupted(
        &mut self,
        open: &mut Open,
        events: &mut Vec<Event>,
    ) -> Result<RoundEnd, Broken> {
        let began = match self.withheld.give_up() {
            Some(About::Input) => {
                let why = "the stream closed before the input of this create was judged";
                return Err(Broken::Refused(Error::new(Code::Draining, why)));
            }
            Some(About::Presumed(before)) => return Err(Broken::Presumed(before)),
            Some(About::Output(began)) => Some(began),
            None if open.withholds() => open.piece(true).map(|it| it.began),
            None => None,
        };
        Ok(match began {
            Some(began) => {
                events.clear();
                open.roll_back(began, RoundEnd::Interrupted, events)
            }
            None => RoundEnd::Interrupted,
        })
    }

    /// Input does not pass. Where nothing of the response was told, it does not exist; what was sampled for
    /// it meanwhile is charged.
    pub(super) async fn refused(&mut self, open: Open, error: Error) {
        self.withheld.give_up();
        if self.told {
            return self.failed(open, error, Vec::new()).await;
        }
        let settlement = Settlement::new(&Status::Failed(error.clone()), None);
        if let (Some(meter), Some(settlement)) = (self.meter.take(), settlement) {
            meter.settle(settlement, self.counts(&open));
        }
        self.refuse(error).await;
    }

    /// Takes a command, or has its input judged first. Those behind it wait for it.
    pub(super) async fn control(&mut self, control: Option<Control>, open: &mut Open) {
        let mut verdict = None;
        match &control {
            Some(Control {
                what: What::Append(input),
                request_id,
                ..
            }) => match open.inquiries_about(input, &self.shared.held) {
                Ok(inquiries) => verdict = self.ask(inquiries, open),
                Err(error) => {
                    let error = Event::Error(Box::new(error));
                    return self.answer(vec![error], request_id.clone()).await;
                }
            },
            Some(_) => {}
            None => self.controls = None,
        }
        if verdict.is_none() && self.unadmitted.is_empty() {
            return self.obey(control, open, Vec::new()).await;
        }
        self.unadmitted.push_back(Unadmitted { control, verdict });
    }

    /// The first command that waits is taken, or refused, as its input was judged.
    pub(super) async fn admit(&mut self, judgement: Arc<Judgement>, open: &mut Open) {
        let Some(Unadmitted { control, .. }) = self.unadmitted.pop_front() else {
            return;
        };
        let verdicts = told(&judgement.verdicts);
        match (control, judgement.refusal.clone()) {
            (Some(control), Some(error)) => {
                let error = Event::Error(Box::new(error));
                self.answer(vec![error], control.request_id).await;
            }
            (control, _) => self.obey(control, open, verdicts).await,
        }
    }

    /// Takes the input that waits as if it had passed, where the response then has all that it waits for: so the model
    /// samples while the input is judged, and what it gives is withheld.
    pub(super) fn presume(&mut self, open: &mut Open) -> bool {
        let overlaps = open.policy().is_some_and(|it| it.gate() == GateAt::Output);
        let appended = self.unadmitted.iter().map(Unadmitted::append);
        let appended: Option<Vec<(Vec<NewItem>, RequestId)>> = appended.collect();
        let Some(appended) = appended.filter(|it| overlaps && !it.is_empty()) else {
            return false;
        };
        let Ok(slot) = self.shared.slots.clone().try_acquire_owned() else {
            return false;
        };
        let before = open.before();
        let Some(told) = self.presumed_events(appended, open) else {
            open.take_back(before);
            return false;
        };
        self.slot = Some(slot);
        self.presumed = told.len();
        let verdicts = self.unadmitted.iter().filter_map(|it| it.verdict.clone());
        let verdict = withheld::all(verdicts.collect());
        let about = About::Presumed(Box::new(before));
        self.withheld.wait_for(verdict, about);
        for (events, request_id) in told {
            self.withhold(events, request_id, false);
        }
        true
    }

    /// What is told of this input once it has passed. `None`: it cannot be sampled for with it.
    fn presumed_events(
        &mut self,
        appended: Vec<(Vec<NewItem>, RequestId)>,
        open: &mut Open,
    ) -> Option<Vec<(Vec<Event>, RequestId)>> {
        let mut told = Vec::new();
        for (input, request_id) in appended {
            let event = open.append(input, &self.shared.held).ok()?;
            let events = std::iter::once(event).chain(open.take_verdicts());
            told.push((events.collect(), request_id));
        }
        self.clock.mark(|timing| &mut timing.checked);
        if open.next() != Next::Sample {
            return None;
        }
        open.prepare(true).ok()?;
        self.clock.mark(|timing| &mut timing.rendered);
        self.afford(open).ok()?;
        Some(told)
    }

    /// Input that was presumed to pass does not: the response stands as before it.
    pub(super) fn unpresume(&mut self, open: &mut Open, before: Before) {
        self.withheld.give_up();
        self.presumed = 0;
        self.slot = None;
        open.take_back(before);
    }

    /// The sample has ended, and the response may go on with what still waits to be judged.
    pub(super) async fn all_admitted(&mut self, open: &mut Open) -> Result<(), Stop> {
        while !self.unadmitted.is_empty() {
            tokio::select! {
                biased;
                stop = self.stops.stopped() => return Err(stop),
                control = receive(&mut self.controls) => self.control(control, open).await,
                judgement = admissible(&mut self.unadmitted) => self.admit(judgement, open).await,
            }
        }
        Ok(())
    }

    /// Does what a command asks of the open response, and answers it. `None`: no more will come.
    async fn obey(&mut self, control: Option<Control>, open: &mut Open, verdicts: Vec<Event>) {
        let Some(control) = control else {
            return open.release();
        };
        let event = match control.what {
            What::Append(input) => open
                .append(input, &self.shared.held)
                .unwrap_or_else(|error| Event::Error(Box::new(error))),
            What::Done => return open.end_as_it_stands(),
        };
        let found = open.take_verdicts().chain(verdicts);
        let events = std::iter::once(event).chain(found).collect();
        self.answer(events, control.request_id).await;
    }

    /// Commands that still wait when the response has ended.
    pub(super) fn unadmitted(&mut self) -> Vec<Control> {
        let waiting = std::mem::take(&mut self.unadmitted);
        waiting.into_iter().filter_map(|it| it.control).collect()
    }
}

/// Verdicts as they are told, and logged.
fn told(verdicts: &[Verdict]) -> Vec<Event> {
    verdicts.iter().for_each(safety::log);
    verdict_events(verdicts.to_vec())
}

fn verdict_events(verdicts: Vec<Verdict>) -> Vec<Event> {
    let verdicts = verdicts.into_iter();
    verdicts.map(|it| Event::Verdict(Box::new(it))).collect()
}
