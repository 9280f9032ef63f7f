use super::*;

fn budget(name: &str, per: Per) -> BudgetOptions {
    BudgetOptions {
        name: name.into(),
        per,
        tenants: Vec::new(),
        models: Vec::new(),
        window_secs: 0,
        input_tokens_max: 0,
        output_tokens_max: 0,
        calls_max: 0,
        sample_secs_max: 0,
        cost_max: 0.0,
    }
}

fn output(max: u64) -> BudgetOptions {
    BudgetOptions {
        output_tokens_max: max,
        ..budget("out", Per::Tenant)
    }
}

fn of(options: &[BudgetOptions]) -> Arc<Budgets> {
    let price = Price {
        model: "m".into(),
        input: 2.0,
        cached: Some(0.5),
        output: 10.0,
    };
    for options in options {
        options.check().unwrap();
    }
    Arc::new(Budgets::new(options, &[price]))
}

/// A sample that took so long and made so many calls.
fn took(took_ms: u64, calls: u64) -> Sampled {
    Sampled {
        took_ms,
        calls,
        ..Sampled::default()
    }
}

fn spent(name: &str, kind: Kind) -> Spent {
    Spent {
        name: name.into(),
        kind,
        full_in_ms: None,
    }
}

#[test]
fn what_nothing_limits_is_free() {
    let mut purse = of(&[]).wallet("acme", "k").begin("m");
    assert!(purse.is_free());
    assert_eq!(purse.sample(1 << 40, 0), Ok(None));
    assert_eq!(purse.output(1 << 40, 0, 0), Ok(()));
    assert_eq!(purse.time_left_ms(0), None);
    // Budgets of other tenants and models are none.
    let other = BudgetOptions {
        tenants: vec!["zen".into()],
        ..output(1)
    };
    let model = BudgetOptions {
        models: vec!["n".into()],
        ..output(1)
    };
    assert!(of(&[other, model]).wallet("acme", "k").begin("m").is_free());
}

#[test]
fn an_answer_is_cut_to_what_is_left_and_what_it_does_not_use_goes_back() {
    let budgets = of(&[output(1000)]);
    let mut one = budgets.wallet("acme", "k").begin("m");
    assert_eq!(one.sample(50, 0), Ok(Some(1000)));
    one.output(10, 0, 0).unwrap();
    // Another one sees what the first has reserved, not what it asked for.
    let mut two = budgets.wallet("acme", "k2").begin("m");
    assert_eq!(two.sample(50, 0), Ok(Some(1000 - SLICE_TOKENS)));
    two.settle_sample(took(5, 0), 0);
    one.settle_sample(took(5, 0), 0);
    assert_eq!(one.sample(50, 0), Ok(Some(990)));
    one.output(990, 0, 0).unwrap_err();
    one.settle_sample(took(5, 0), 0);
    assert_eq!(one.sample(50, 0), Err(spent("out", Kind::Output)));
    // Another tenant has one of its own.
    let mut zen = budgets.wallet("zen", "k").begin("m");
    assert_eq!(zen.sample(50, 0), Ok(Some(1000)));
}

#[test]
fn samples_at_once_spend_each_token_once() {
    let budgets = of(&[output(600)]);
    let mut purses: Vec<Purse> = (0..4)
        .map(|_| budgets.wallet("a", "k").begin("m"))
        .collect();
    let mut sampled = 0;
    let mut running: Vec<&mut Purse> = Vec::new();
    for purse in &mut purses {
        if purse.sample(1, 0).is_ok() {
            running.push(purse);
        }
    }
    assert_eq!(running.len(), 3, "256 + 256 + 88 are reserved");
    while !running.is_empty() {
        running.retain_mut(|purse| {
            sampled += 1;
            purse.output(1, 0, 0).is_ok()
        });
    }
    assert_eq!(sampled, 600);
}

#[test]
fn a_window_fills_it_again() {
    let hourly = BudgetOptions {
        window_secs: 3600,
        ..output(100)
    };
    let budgets = of(&[hourly]);
    let mut purse = budgets.wallet("acme", "k").begin("m");
    let at = 5 * 3_600_000 + 1000;
    assert_eq!(purse.sample(1, at), Ok(Some(100)));
    purse.output(100, 0, at).unwrap_err();
    purse.settle_sample(took(0, 0), at);
    let error = purse.sample(1, at).unwrap_err();
    assert_eq!(error.full_in_ms, Some(3_599_000));
    assert_eq!(
        error.to_string(),
        "the budget `out` is spent: output tokens"
    );
    assert_eq!(purse.sample(1, at + 3_599_000), Ok(Some(100)));
    // What was reserved in a window that is over is not given back to the next one.
    purse.settle_sample(took(0, 0), at + 2 * 3_600_000);
    assert_eq!(purse.sample(1, at + 2 * 3_600_000), Ok(Some(100)));
}

#[test]
fn money_is_counted_by_the_price_and_the_cache_saves_some() {
    let cost = BudgetOptions {
        // 10,000 times a millionth.
        cost_max: 0.01,
        ..budget("money", Per::Key)
    };
    let budgets = of(&[cost]);
    let mut purse = budgets.wallet("acme", "k").begin("m");
    // 1,000 tokens at 2 leave 8,000, which are 800 tokens at 10.
    assert_eq!(purse.sample(1000, 0), Ok(Some(800)));
    purse.output(100, 0, 0).unwrap();
    // 900 of the prompt were cached: 1.5 less for each.
    let sampled = Sampled {
        input_tokens: 1000,
        cached_tokens: 900,
        output_tokens: 100,
        ..took(1, 0)
    };
    purse.settle_sample(sampled, 0);
    assert_eq!((purse.sample_ms(), purse.cost_nanos()), (1, 1_650_000));
    // 2,000 + 1,000 - 1,350 are spent.
    assert_eq!(purse.sample(0, 0), Ok(Some(835)));
    purse.settle_sample(took(1, 0), 0);
    assert_eq!(purse.sample(5000, 0), Err(spent("money", Kind::Cost)));
    // A model without a price costs nothing.
    let mut other = budgets.wallet("acme", "k").begin("n");
    assert_eq!(other.sample(1 << 30, 0), Ok(None));
}

#[test]
fn input_calls_and_time_are_limited_and_a_stream_has_its_own() {
    let all = BudgetOptions {
        input_tokens_max: 100,
        calls_max: 3,
        sample_secs_max: 2,
        ..budget("s", Per::Stream)
    };
    let budgets = of(&[all]);
    let wallet = budgets.wallet("acme", "k");
    let mut purse = wallet.begin("m");
    assert_eq!(purse.sample(101, 0), Err(spent("s", Kind::Input)));
    assert_eq!(purse.sample(60, 0), Ok(None));
    assert_eq!(purse.time_left_ms(0), Some(2000));
    let sampled = Sampled {
        input_tokens: 60,
        ..took(500, 2)
    };
    purse.settle_sample(sampled, 0);
    assert_eq!(purse.time_left_ms(0), Some(1500));
    // Responses of one stream share it.
    let mut next = wallet.begin("m");
    assert_eq!(next.sample(41, 0), Err(spent("s", Kind::Input)));
    assert_eq!(next.sample(10, 0), Ok(None));
    next.settle_sample(took(100, 1), 0);
    assert_eq!(next.sample(1, 0), Err(spent("s", Kind::Calls)));
    let mut other = budgets.wallet("acme", "k").begin("m");
    assert_eq!(other.sample(60, 0), Ok(None));
    other.settle_sample(took(2000, 0), 0);
    assert_eq!(other.sample(1, 0), Err(spent("s", Kind::Time)));
}

#[test]
fn a_purse_takes_from_all_ledgers_or_from_none() {
    let tight = BudgetOptions {
        input_tokens_max: 10,
        ..budget("tight", Per::Key)
    };
    let budgets = of(&[output(1000), tight]);
    let mut purse = budgets.wallet("acme", "k").begin("m");
    for _ in 0..10 {
        assert_eq!(purse.sample(11, 0), Err(spent("tight", Kind::Input)));
    }
    let mut other = budgets.wallet("acme", "k2").begin("m");
    assert_eq!(other.sample(10, 0), Ok(Some(1000)));
}

#[test]
fn a_response_that_vanishes_gives_back_what_it_had_not_used() {
    let budgets = of(&[output(1000)]);
    let mut purse = budgets.wallet("acme", "k").begin("m");
    purse.sample(1, 0).unwrap();
    purse.output(10, 0, 0).unwrap();
    drop(purse);
    let mut next = budgets.wallet("acme", "k").begin("m");
    assert_eq!(next.sample(1, 0), Ok(Some(990)));
}

#[test]
fn a_clock_that_is_set_back_fills_nothing_again() {
    let hourly = BudgetOptions {
        window_secs: 3600,
        ..output(100)
    };
    let budgets = of(&[hourly]);
    let mut purse = budgets.wallet("acme", "k").begin("m");
    let (noon, hour) = (12 * 3_600_000, 3_600_000);
    purse.sample(1, noon).unwrap();
    purse.output(60, 0, noon).unwrap();
    purse.settle_sample(took(0, 0), noon);
    // What is reserved while it is behind is given back all the same.
    assert_eq!(purse.sample(1, noon - 1), Ok(Some(40)));
    purse.settle_sample(took(0, 0), noon - 1);
    assert_eq!(purse.sample(1, noon), Ok(Some(40)));
    purse.settle_sample(took(0, 0), noon);
    // One that had been far ahead is not waited for.
    assert_eq!(purse.sample(1, noon + 1000 * hour), Ok(Some(100)));
    purse.output(100, 0, noon + 1000 * hour).unwrap_err();
    purse.settle_sample(took(0, 0), noon + 1000 * hour);
    assert_eq!(purse.sample(1, noon), Ok(Some(100)));
}

#[test]
fn what_a_cache_saved_goes_back_to_the_window_of_its_prompt() {
    let hourly = BudgetOptions {
        window_secs: 3600,
        cost_max: 1.0,
        ..budget("money", Per::Key)
    };
    let budgets = of(&[hourly]);
    let mut purse = budgets.wallet("acme", "k").begin("m");
    let hour = 3_600_000;
    purse.sample(100_000, hour - 1).unwrap();
    // Two slices and a token: the last slice is of the next window, and a token of it is used.
    purse.output(256, 0, hour).unwrap();
    purse.output(257, 0, hour).unwrap();
    let sampled = Sampled {
        input_tokens: 100_000,
        cached_tokens: 100_000,
        output_tokens: 513,
        ..took(0, 0)
    };
    purse.settle_sample(sampled, hour);
    // 257 tokens at 10 were used in this window.
    assert_eq!(purse.sample(0, hour), Ok(Some(100_000 - 257)));
}

#[test]
fn short_answers_of_cheap_models_are_not_rounded_away() {
    let cheap = Price {
        model: "m".into(),
        input: 0.02,
        cached: None,
        output: 0.02,
    };
    let cost = BudgetOptions {
        // 1,000 tokens.
        cost_max: 0.000_02,
        ..budget("money", Per::Tenant)
    };
    let budgets = Arc::new(Budgets::new(&[cost], &[cheap]));
    let mut purse = budgets.wallet("acme", "k").begin("m");
    let tiny = Sampled {
        input_tokens: 5,
        output_tokens: 5,
        ..took(0, 0)
    };
    let mut samples = 0;
    while purse.sample(5, 0).is_ok() {
        let ended = purse.output(5, 0, 0).is_err();
        purse.settle_sample(tiny, 0);
        samples += 1;
        assert_eq!(ended, samples == 100, "{samples}");
    }
    assert_eq!(samples, 100);
    assert_eq!(purse.cost_nanos(), 20_000);
}

#[test]
fn a_price_of_almost_nothing_leaves_as_much_as_there_is() {
    let price = Price {
        model: "m".into(),
        input: 0.0,
        cached: None,
        output: 1e-300,
    };
    let cost = BudgetOptions {
        cost_max: 1.0,
        ..budget("money", Per::Tenant)
    };
    let mut purse = Arc::new(Budgets::new(&[cost], &[price]))
        .wallet("acme", "k")
        .begin("m");
    assert_eq!(purse.sample(1, 0), Ok(Some(u64::MAX)));
}

#[test]
fn samples_at_once_share_the_time_as_it_passes() {
    let time = BudgetOptions {
        sample_secs_max: 1,
        ..budget("time", Per::Tenant)
    };
    let budgets = of(&[time]);
    let mut one = budgets.wallet("acme", "k").begin("m");
    let mut two = budgets.wallet("acme", "k").begin("m");
    for purse in [&mut one, &mut two] {
        purse.sample(1, 0).unwrap();
        assert_eq!(purse.time_left_ms(0), Some(1000));
    }
    one.output(1, 400, 0).unwrap();
    two.output(1, 400, 0).unwrap();
    one.output(1, 500, 0).unwrap();
    assert_eq!(two.output(1, 500, 0), Err(spent("time", Kind::Time)));
    // No time is paid for twice.
    one.settle_sample(took(500, 0), 0);
    two.settle_sample(took(501, 0), 0);
    assert_eq!((one.sample_ms(), two.sample_ms()), (500, 501));
    let other = budgets.wallet("acme", "k").begin("m");
    assert_eq!(other.lines[0].used(0).millis, 1001);
}

#[test]
fn a_prompt_counts_as_it_was_counted_in_the_end() {
    let input = BudgetOptions {
        input_tokens_max: 100,
        ..budget("in", Per::Tenant)
    };
    let budgets = of(&[input]);
    let mut purse = budgets.wallet("acme", "k").begin("m");
    for (estimated, counted) in [(30, 50), (50, 20)] {
        purse.sample(estimated, 0).unwrap();
        let sampled = Sampled {
            input_tokens: counted,
            ..took(0, 0)
        };
        purse.settle_sample(sampled, 0);
    }
    assert_eq!(purse.sample(31, 0), Err(spent("in", Kind::Input)));
    assert_eq!(purse.sample(30, 0), Ok(None));
}

#[test]
fn what_never_fits_is_not_promised_for_later() {
    let hourly = BudgetOptions {
        input_tokens_max: 100,
        window_secs: 3600,
        ..budget("in", Per::Tenant)
    };
    let budgets = of(&[hourly]);
    let mut purse = budgets.wallet("acme", "k").begin("m");
    let full_in = |purse: &mut Purse, tokens| purse.sample(tokens, 0).unwrap_err().full_in_ms;
    assert_eq!(full_in(&mut purse, 101), None);
    purse.sample(60, 0).unwrap();
    assert_eq!(full_in(&mut purse, 60), Some(3_600_000));
}

#[test]
fn who_takes_over_pays_from_there_and_the_sample_not_begun_costs_nothing() {
    let of_model = |name: &str, model: &str| BudgetOptions {
        models: vec![model.into()],
        input_tokens_max: 100,
        ..budget(name, Per::Tenant)
    };
    let budgets = of(&[of_model("first", "m"), of_model("second", "n")]);
    let wallet = budgets.wallet("acme", "k");
    let mut purse = wallet.begin("m");
    purse.sample(100, 0).unwrap();
    let sampled = Sampled {
        input_tokens: 40,
        ..took(7, 0)
    };
    purse.settle_sample(sampled, 0);
    purse.sample(60, 0).unwrap();
    purse.hand_over(wallet.begin("n"));
    purse.sample(100, 0).unwrap();
    // What the first one took and cost stands on the record, and 60 are left of its budget.
    assert_eq!((purse.sample_ms(), purse.cost_nanos()), (7, 80_000));
    assert_eq!(wallet.begin("m").sample(60, 0), Ok(None));
    assert_eq!(
        wallet.begin("n").sample(1, 0),
        Err(spent("second", Kind::Input))
    );
}

fn tally(tenant: &str, key: &str, model: &str, output_tokens: u64) -> Tally {
    Tally {
        tenant: tenant.into(),
        key: key.into(),
        model: model.into(),
        input_tokens: 10,
        output_tokens,
        calls: 2,
        sample_ms: 300,
        cost_nanos: 4_000_000,
    }
}

#[test]
fn what_an_earlier_process_used_in_the_windows_that_run_is_charged() {
    let (hour, day) = (3_600_000, 24 * 3_600_000);
    let hourly = BudgetOptions {
        window_secs: 3600,
        ..output(1000)
    };
    let daily = BudgetOptions {
        name: "day".into(),
        per: Per::Key,
        window_secs: 24 * 3600,
        models: vec!["m".into()],
        calls_max: 5,
        output_tokens_max: 5000,
        ..budget("", Per::Key)
    };
    let ever = BudgetOptions {
        cost_max: 1.0,
        tenants: vec!["acme".into()],
        ..budget("ever", Per::Tenant)
    };
    let own = BudgetOptions {
        output_tokens_max: 10,
        ..budget("own", Per::Stream)
    };
    let budgets = of(&[hourly, daily, ever, own]);
    let now = 3 * day + 5 * hour + 7;
    let read = |since| {
        Ok::<_, ()>(match since {
            0 => vec![tally("acme", "a", "m", 1), tally("zen", "a", "m", 1)],
            it if it == 3 * day => vec![tally("acme", "a", "m", 700), tally("acme", "a", "n", 700)],
            it if it == 3 * day + 5 * hour => vec![
                tally("acme", "a", "m", 100),
                tally("acme", "b", "n", 200),
                tally("zen", "a", "m", 400),
            ],
            other => panic!("{other}"),
        })
    };
    budgets.restore(now, read).unwrap();
    let used = |tenant: &str, key: &str| {
        let purse = budgets.wallet(tenant, key).begin("m");
        let lines = purse.lines.iter();
        let used = lines.map(|line| (line.budget.name.to_string(), line.used(now)));
        used.collect::<Vec<_>>()
    };
    let all = |input, output, calls, millis, nanos| Amounts {
        input,
        output,
        calls,
        millis,
        nanos,
    };
    let named = |name: &str, amounts| (name.to_owned(), amounts);
    let none = Amounts::default();
    assert_eq!(
        used("acme", "a"),
        [
            named("out", all(20, 300, 4, 600, 8_000_000)),
            named("day", all(10, 700, 2, 300, 4_000_000)),
            named("ever", all(10, 1, 2, 300, 4_000_000)),
            named("own", none),
        ]
    );
    assert_eq!(
        used("zen", "a"),
        [
            named("out", all(10, 400, 2, 300, 4_000_000)),
            named("day", none),
            named("own", none),
        ]
    );
    assert_eq!(budgets.restore(now, |_| Err("broken")), Err("broken"));
}

#[test]
fn new_limits_hold_for_what_begins_and_what_was_used_stays_used() {
    let own = |max| BudgetOptions {
        output_tokens_max: max,
        ..budget("own", Per::Stream)
    };
    let budgets = of(&[output(100), own(50)]);
    let wallet = budgets.wallet("acme", "k");
    let mut begun = wallet.begin("m");
    assert_eq!(begun.sample(1, 0), Ok(Some(50)));
    begun.output(30, 0, 0).unwrap();
    budgets.replace(&[own(80), output(60)], &[]);
    // What runs goes on under what it began with.
    begun.output(10, 0, 0).unwrap();
    begun.output(10, 0, 0).unwrap_err();
    begun.settle_sample(took(0, 0), 0);
    // On the same stream, and on another one of the tenant.
    let left = |wallet: &Wallet| wallet.begin("m").sample(1, 0);
    assert_eq!(left(&wallet), Ok(Some(10)));
    budgets.replace(&[own(80), output(400)], &[]);
    assert_eq!(left(&wallet), Ok(Some(30)));
    assert_eq!(left(&budgets.wallet("acme", "k")), Ok(Some(80)));
    // One that is for another time, or for others, begins anew; one that is gone limits nothing.
    let hourly = BudgetOptions {
        window_secs: 3600,
        ..output(60)
    };
    budgets.replace(&[hourly], &[]);
    assert_eq!(left(&wallet), Ok(Some(60)));
    assert!(wallet.own.lock().len() <= 1);
    budgets.replace(&[], &[]);
    assert_eq!(left(&wallet), Ok(None));
}

#[test]
fn what_cannot_be_is_refused() {
    let check = |options: BudgetOptions| options.check().unwrap_err();
    assert_eq!(check(budget("x", Per::Key)), "it limits nothing");
    assert_eq!(
        check(BudgetOptions {
            name: String::new(),
            ..output(1)
        }),
        "name is not 1 to 64 bytes"
    );
    assert_eq!(
        check(BudgetOptions {
            cost_max: -1.0,
            ..output(1)
        }),
        "cost_max is not from 0 to 1e9"
    );
    assert_eq!(
        check(BudgetOptions {
            window_secs: u64::MAX,
            ..output(1)
        }),
        "window_secs is over 31622400"
    );
    let price = Price {
        model: "m".into(),
        input: f64::NAN,
        cached: None,
        output: 1.0,
    };
    assert_eq!(price.check().unwrap_err(), "input is not from 0 to 1e9");
}
