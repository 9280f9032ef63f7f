//! How a response begins: what it continues, its turn, and its first prompt.

use super::*;

impl Driver<'_> {
    /// Runs the response to its end, now that its turn has come.
    pub(super) async fn serve(
        &mut self,
        mut create: Create,
        parent: Option<Arc<Committed>>,
        created_at_ms: u64,
    ) {
        self.clock.mark(|timing| &mut timing.started);
        let mut open = match self.start(&mut create, parent, created_at_ms).await {
            Ok(open) => open,
            Err(unbegun) => return self.unbegun(unbegun).await,
        };
        tracing::Span::current().record("model", &*open.model().name);
        let created = Event::Created {
            model: open.model().name.clone(),
            previous: create.previous.take(),
            created_at_ms,
        };
        let found = open.take_verdicts().chain(self.found());
        let events = std::iter::once(created).chain(found).collect();
        self.send(events).await;
        if !create.prepare_only {
            return self.rounds(open).await;
        }
        match self.warm_up(&open).await {
            Some(Stop::Cancelled) => self.cancelled(&open).await,
            // What was prepared stays prepared.
            None | Some(Stop::Interrupted | Stop::Gone) => {
                self.finish(open, End::Completed, Vec::new()).await;
            }
        }
    }

    /// The response with its first prompt, which is afforded and can be recorded.
    async fn start(
        &mut self,
        create: &mut Create,
        parent: Option<Arc<Committed>>,
        created_at_ms: u64,
    ) -> Result<Open, Unbegun> {
        let asked = create.settings.model.clone().unwrap_or_default();
        let mut open = self.begin(create, parent, created_at_ms).await?;
        // Nothing waits for a warm-up, so it waits for all that is said.
        let policy = open.policy();
        if create.prepare_only || policy.is_some_and(|it| it.gate() == GateAt::Sampling) {
            self.input_judged().await?;
        }
        self.purse = self.shared.wallet.begin(&open.model().name);
        if !create.prepare_only {
            self.afford(&mut open).map_err(|spent| quota(&spent))?;
        }
        let meter = self.reserve(&open, asked).await;
        self.meter = Some(meter.inspect_err(|_| self.purse.abandon())?);
        Ok(open)
    }

    /// It did not begin: the client hears why.
    pub(super) async fn unbegun(&mut self, unbegun: Unbegun) {
        match unbegun {
            Unbegun::Refused(error) => self.refuse(*error).await,
            Unbegun::Stopped(stop) => self.stopped_early(stop).await,
        }
    }

    /// Waits for what is continued and for the turn. What the store must be asked for is read
    /// while the lane may still be busy, and is refused as soon as that is known.
    pub(super) async fn wait(
        &mut self,
        before: &Turn,
        parent: Option<Parent>,
    ) -> Result<Option<Arc<Committed>>, Unbegun> {
        let parent = match parent {
            Some(Parent::Stored(id)) => Some(Parent::Committed(self.load(&id).await?)),
            Some(Parent::Committed(_) | Parent::Running(_)) | None => parent,
        };
        self.turn(before).await?;
        Ok(match parent {
            None => None,
            Some(Parent::Committed(found)) => Some(found),
            // It has ended by now, and may have left memory since.
            Some(Parent::Running(id) | Parent::Stored(id)) => Some(self.load(&id).await?),
        })
    }

    /// The response to continue.
    pub(super) async fn load(&self, id: &ResponseId) -> Result<Arc<Committed>, Unbegun> {
        let Shared { archive, held, .. } = self.shared;
        tokio::select! {
            biased;
            stop = self.stops.stopped() => Err(stop.into()),
            found = archive.load(held.tenant(), id) => {
                // Whoever continues a response can send the whole conversation instead.
                let found = found.unwrap_or_else(|error| {
                    tracing::error!(%error, "the store cannot be read");
                    None
                });
                found.ok_or_else(|| not_found(id).into())
            }
        }
    }

    /// Waits for the turn on the lane and for a slot to sample in.
    pub(super) async fn turn(&mut self, before: &Turn) -> Result<(), Stop> {
        tokio::select! {
            biased;
            stop = self.stops.stopped() => return Err(stop),
            () = before.ended() => {}
        }
        if self.slot.is_none() {
            self.slot = tokio::select! {
                biased;
                stop = self.stops.stopped() => return Err(stop),
                slot = self.shared.slots.clone().acquire_owned() => slot.ok(),
            };
        }
        Ok(())
    }

    /// Validates, checks and renders the input.
    pub(super) async fn begin(
        &mut self,
        create: &mut Create,
        parent: Option<Arc<Committed>>,
        created_at_ms: u64,
    ) -> Result<Open, Error> {
        let inherited = parent.as_ref().map(|parent| parent.settings.clone());
        let own = std::mem::take(&mut create.settings);
        let head_bytes = own.head_bytes();
        let settings = match &inherited {
            Some(parent) if own == Settings::default() && create.reset.is_empty() => parent.clone(),
            Some(parent) => Arc::new(own.inherit(parent, &create.reset)),
            None => Arc::new(own),
        };
        let model = self
            .shared
            .models
            .get(
                settings.model.as_deref(),
                parent.as_ref().map(|parent| &*parent.model),
                self.id.as_str(),
            )
            .ok_or_else(|| {
                let name = settings.model.as_deref().unwrap_or_default();
                Error::new(
                    Code::ModelNotFound,
                    format!("no model has the name `{name}`"),
                )
                .at("create.model")
            })?;
        let model = well(model, &self.shared.models);
        let input = std::mem::take(&mut create.input);
        let input_bytes = input.iter().map(|new| match new {
            NewItem::Item(item) => item.text_bytes(),
            NewItem::Reference(_) => 0,
        });
        let text_bytes = head_bytes + input_bytes.sum::<usize>();
        let policy = self.policy(&model);
        let ids: Vec<ItemId> = match &policy {
            Some(_) => input.iter().map(|new| new.id().clone()).collect(),
            None => Vec::new(),
        };
        let valid = {
            let past = Past {
                open_calls: parent.as_ref().map_or(&[], |parent| &parent.open_calls),
                exists: parent.is_some(),
                find_item: &|id| self.shared.held.find_item(id),
            };
            Create::validate(
                input,
                settings,
                create.prepare_only,
                &past,
                &model.abilities(),
            )?
        };
        self.clock.mark(|timing| &mut timing.validated);
        let (past, under) = (parent.clone(), policy.clone());
        let known = past
            .as_ref()
            .is_none_or(|past| past.checked.holds_under(under.as_deref()));
        let sent = ids.clone();
        let check = move || -> Result<(Cleared, Recheck), Error> {
            let names = Names {
                command: "create",
                ids: &sent,
            };
            let cleared = safety::clear(valid.input, under.as_deref(), &names)?;
            Ok((cleared, recheck(past.as_deref(), under.as_deref())?))
        };
        let (cleared, recheck) = match &policy {
            Some(_) if !known || text_bytes >= BLOCKING_BYTES_MIN => {
                let checked = tokio::task::spawn_blocking(check).await;
                checked.unwrap_or_else(|_| Err(Error::new(Code::BackendError, "checking failed")))
            }
            Some(_) | None => check(),
        }?;
        self.clock.mark(|timing| &mut timing.checked);

        let begin = Begin {
            id: self.id.clone(),
            tenant: self.shared.held.tenant().clone(),
            model,
            settings: valid.settings,
            parent,
            today: today(),
            input: cleared,
            open_calls: valid.open_calls,
            created_at_ms,
            metadata: std::mem::take(&mut create.metadata),
            include_output: create.include_output,
            hold: create.hold,
            no_deltas: create.no_deltas,
            policy,
            recheck,
        };
        let heads = self.shared.heads.clone();
        let prepare_only = create.prepare_only;
        let mut open = if text_bytes < BLOCKING_BYTES_MIN {
            Open::begin(begin, &heads, prepare_only)
        } else {
            let prepare = move || Open::begin(begin, &heads, prepare_only);
            let prepared = tokio::task::spawn_blocking(prepare).await;
            prepared.unwrap_or_else(|_| Err(Error::new(Code::BackendError, "rendering failed")))
        }?;
        self.clock.mark(|timing| &mut timing.rendered);
        let names = Names {
            command: "create",
            ids: &ids,
        };
        let inquiries = open.inquiries(&names);
        self.ask_about_input(inquiries, &open);
        Ok(open)
    }

    /// What items are checked under where this model samples.
    pub(super) fn policy(&self, model: &Model) -> Option<Arc<Policy>> {
        let Shared { policies, held, .. } = self.shared;
        policies.get(&model.name, held.tenant())
    }
}

/// How what is continued is checked under this policy. Its items are only looked at where it was
/// checked under another one.
pub(super) fn recheck(
    parent: Option<&Committed>,
    policy: Option<&Policy>,
) -> Result<Recheck, Error> {
    let Some(parent) = parent else {
        let history = History {
            checked: &Checked::default(),
            items: &mut std::iter::empty(),
        };
        return safety::recheck(history, policy);
    };
    let nodes: Vec<&Committed> = match parent.checked.holds_under(policy) {
        true => Vec::new(),
        false => parent.chain().collect(),
    };
    let batches = nodes.iter().rev().flat_map(|node| &node.batches);
    let history = History {
        checked: &parent.checked,
        items: &mut batches.flatten(),
    };
    safety::recheck(history, policy)
}

/// The model, or where nothing that samples from it is well, the first of those that take over from
/// it that is.
pub(super) fn well(model: Arc<Model>, models: &Models) -> Arc<Model> {
    let fallback = |model: &Arc<Model>| {
        let name = model.fallback.as_deref()?;
        models.named(name)
    };
    // The configuration has no circles, but may change in between.
    let chain = std::iter::successors(Some(model.clone()), fallback).take(FALLBACKS_MAX);
    let mut well = chain.filter(|model| model.backend.healthy());
    well.next().unwrap_or(model)
}

pub(super) fn today() -> jiff::civil::Date {
    jiff::Timestamp::now()
        .to_zoned(jiff::tz::TimeZone::UTC)
        .date()
}
