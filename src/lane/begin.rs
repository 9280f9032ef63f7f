//! How a response begins: what it continues, its turn, and its first prompt.

use super::*;

impl Driver<'_> {
    /// Waits for what is continued and for the turn. What the store must be asked for is read
    /// while the lane may still be busy, and is refused as soon as that is known.
    pub(super) async fn wait(
        &mut self,
        before: &Turn,
        parent: Option<Parent>,
    ) -> Result<Result<Option<Arc<Committed>>, Error>, Stop> {
        let parent = match parent {
            Some(Parent::Stored(id)) => match self.load(&id).await? {
                Ok(found) => Some(Parent::Committed(found)),
                Err(error) => return Ok(Err(error)),
            },
            Some(Parent::Committed(_) | Parent::Running(_)) | None => parent,
        };
        self.turn(before).await?;
        Ok(match parent {
            None => Ok(None),
            Some(Parent::Committed(found)) => Ok(Some(found)),
            // It has ended by now, and may have left memory since.
            Some(Parent::Running(id) | Parent::Stored(id)) => self.load(&id).await?.map(Some),
        })
    }

    /// The response to continue.
    pub(super) async fn load(
        &self,
        id: &ResponseId,
    ) -> Result<Result<Arc<Committed>, Error>, Stop> {
        let Shared { archive, held, .. } = self.shared;
        tokio::select! {
            biased;
            stop = self.stops.stopped() => Err(stop),
            found = archive.load(held.tenant(), id) => Ok(match found {
                Ok(found) => found.ok_or_else(|| not_found(id)),
                // Whoever continues a response can send the whole conversation instead.
                Err(error) => {
                    tracing::error!(%error, "the store cannot be read");
                    Err(not_found(id))
                }
            }),
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
