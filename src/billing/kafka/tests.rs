use std::collections::BTreeSet;

use super::*;

/// What Kafka's own `Utils.murmur2` makes of these, made positive, in a topic of 1,000 partitions.
#[test]
fn a_tenant_lies_where_other_clients_put_it() {
    let partition = |key| partition(key, 1000);
    assert_eq!(
        ["21", "foobar", "a-little-bit-long-string", "abc"].map(partition),
        [
            (-973_932_308_i32 & i32::MAX) % 1000,
            (-790_332_482_i32 & i32::MAX) % 1000,
            (-985_981_536_i32 & i32::MAX) % 1000,
            479_470_107 % 1000,
        ]
    );
    let all: BTreeSet<i32> = (0..100)
        .map(|n| super::partition(&format!("tenant {n}"), 3))
        .collect();
    assert_eq!(all, BTreeSet::from([0, 1, 2]));
}
