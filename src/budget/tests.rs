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
    assert_eq!(purse.output(1 << 40, 0), Ok(()));
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
    one.output(10, 0).unwrap();
    // Another one sees what the first has reserved, not what it asked for.
    let mut two = budgets.wallet("acme", "k2").begin("m");
    assert_eq!(two.sample(50, 0), Ok(Some(1000 - SLICE_TOKENS)));
    two.settle_sample(5, 0, 0, 0);
    one.settle_sample(5, 0, 0, 0);
    assert_eq!(one.sample(50, 0), Ok(Some(990)));
    one.output(990, 0).unwrap_err();
    one.settle_sample(5, 0, 0, 0);
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
            purse.output(1, 0).is_ok()
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
    purse.output(100, at).unwrap_err();
    purse.settle_sample(0, 0, 0, at);
    let error = purse.sample(1, at).unwrap_err();
    assert_eq!(error.full_in_ms, Some(3_599_000));
    assert_eq!(
        error.to_string(),
        "the budget `out` is spent: output tokens"
    );
    assert_eq!(purse.sample(1, at + 3_599_000), Ok(Some(100)));
    // What was reserved in a window that is over is not given back to the next one.
    purse.settle_sample(0, 0, 0, at + 2 * 3_600_000);
    assert_eq!(purse.sample(1, at + 2 * 3_600_000), Ok(Some(100)));
}

#[test]
fn money_is_counted_by_the_price_and_the_cache_saves_some() {
    let cost = BudgetOptions {
        // 10,000 millionths.
        cost_max: 0.01,
        ..budget("money", Per::Key)
    };
    let budgets = of(&[cost]);
    let mut purse = budgets.wallet("acme", "k").begin("m");
    // 1,000 tokens at 2 leave 8,000, which are 800 tokens at 10.
    assert_eq!(purse.sample(1000, 0), Ok(Some(800)));
    purse.output(100, 0).unwrap();
    // 900 of the prompt were cached: 1.5 less for each.
    purse.settle_sample(1, 0, 900, 0);
    // 2,000 + 1,000 - 1,350 are spent.
    assert_eq!(purse.sample(0, 0), Ok(Some(835)));
    purse.settle_sample(1, 0, 0, 0);
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
    purse.settle_sample(500, 2, 0, 0);
    assert_eq!(purse.time_left_ms(0), Some(1500));
    // Responses of one stream share it.
    let mut next = wallet.begin("m");
    assert_eq!(next.sample(41, 0), Err(spent("s", Kind::Input)));
    assert_eq!(next.sample(10, 0), Ok(None));
    next.settle_sample(100, 1, 0, 0);
    assert_eq!(next.sample(1, 0), Err(spent("s", Kind::Calls)));
    let mut other = budgets.wallet("acme", "k").begin("m");
    assert_eq!(other.sample(60, 0), Ok(None));
    other.settle_sample(2000, 0, 0, 0);
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
    purse.output(10, 0).unwrap();
    drop(purse);
    let mut next = budgets.wallet("acme", "k").begin("m");
    assert_eq!(next.sample(1, 0), Ok(Some(990)));
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
        "cost_max is not from 0 to 1e12"
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
