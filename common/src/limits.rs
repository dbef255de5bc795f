//! Capacities, and the arithmetic that relates them. Memory is what the kernel takes, with its own
//! overhead of about 48 bytes for each entry of a preallocated hash.

/// `FRONTENDS`: 10,000 services with two ports and two families, and a row for each of their cluster IPs. 65,536 × (24 + 24 + 48) = 6 MB.
pub const FRONTENDS: u32 = 65_536;
/// `BACKENDS`: 100,000 endpoints, held twice while a service is rewritten. 262,144 × 24 = 6 MB.
pub const BACKENDS: u32 = 262_144;
/// `LIVE`: one row for each address, port and protocol behind a Service: 100,000 endpoints with one port each, or 10,000
/// services with six endpoints of two ports. Backends that drain keep theirs until new ones need it. Who finds no row is
/// told, and nobody else suffers. Twice as many would take another megabyte, and another layout: flows would not find
/// their backends in it, and every translated connection would end at the upgrade. 131,072 × 8 = 1 MB.
pub const LIVE: u32 = 131_072;
/// `NODES`: 5,000 nodes, three addresses each. Not preallocated.
pub const NODES: u32 = 16_384;
/// `AFFINITY`: clients of services with session affinity. 65,536 × (24 + 40 + 48) = 7 MB.
pub const AFFINITY: u32 = 65_536;
/// `SOCKETS`: two rows for each translated datagram socket, one for each connected one.
/// 65,536 × (32 + 28 + 48) = 7 MB.
pub const SOCKETS: u32 = 65_536;
/// `UNUSED_PORTS`: a bit for each port, and behind them a number for each program at a socket hook. 1,032 × 8 = 8 KB.
pub const UNUSED_PORTS: u32 = 65_536 / 64;
pub const SOCKET_HOOKS: u32 = 8;
/// `CONNECTED`: connected UDP sockets of the node's own processes. 16,384 × (8 + 28 + 48) = 1 MB.
pub const CONNECTED: u32 = 16_384;
/// `HOSTNET_PORTS`: a bit for each port. 1,024 × 8 = 8 KB.
pub const HOSTNET_PORTS: u32 = 65_536 / 64;
/// `DEVICES` and `PODS`: pods of one node, two addresses each. Kubernetes' own limit is 110 pods.
pub const DEVICES: u32 = 4_096;
pub const PODS: u32 = 2 * DEVICES;
/// `CLASSES`: pods and nodes of the cluster, two addresses each. Not preallocated.
pub const CLASSES: u32 = 524_288;
/// `CIDRS`: blocks of this node's policies, and what they except. Not preallocated.
pub const CIDRS: u32 = 131_072;
/// `VERDICTS`: rule lists of this node's pods × classes. Not preallocated.
pub const VERDICTS: u32 = 262_144;
/// `PORTS`: not preallocated.
pub const PORTS: u32 = 65_536;
/// `TCP_WAYS`: 262,144 connections with two ways each, or half as many that are translated at an uplink, too. Not
/// preallocated, and nothing is ever pushed out: a row costs 40 + 96 + 48 bytes while its connection lives, the
/// table itself 8 MB.
pub const TCP_WAYS: u32 = 524_288;
/// `OTHER_WAYS`: datagrams and the rest, the longest unused pushed out. 131,072 × (40 + 96 + 48) = 24 MB.
pub const OTHER_WAYS: u32 = 131_072;
/// `TCP_PLANS`, `OTHER_PLANS`: a flood of what nobody answers fills its table and no other.
/// 32,768 × (40 + 232 + 48) = 10 MB each.
pub const PLANS: u32 = 32_768;
/// `SHARES`: four times as many as Kubernetes' pods of a node, so that two hardly ever have one. 4,096 × 32 = 128 KB.
pub const SHARES: u32 = DEVICES;
/// `CHOICES`: connections from elsewhere between the first answer and its acknowledgement. 32,768 × (40 + 40 + 48) = 4 MB.
pub const CHOICES: u32 = PLANS;
/// `FRAGMENTS`: packets whose fragments are under way, at each program that they meet. An eighth of the identifications of
/// IPv4: where a sender's come round within the life of a row, it has been pushed out. 8,192 × (48 + 16 + 48) = 1 MB.
pub const FRAGMENTS: u32 = 8_192;
/// `UPLINKS`: devices of the node that lead out of it.
pub const UPLINKS: u32 = 64;
/// `CLUSTER`: ranges of pods and addresses of 5,000 nodes, two families each. Not preallocated.
pub const CLUSTER: u32 = 32_768;
/// `EVENTS` in bytes: a power of two and of pages. 4,096 events of 64 bytes with their headers.
pub const EVENTS_BYTES: u32 = 512 * 1024;

/// Events of one reason that one CPU may send at once, and how many it gains in a second.
pub const EVENT_BURST: u32 = 100;
pub const EVENTS_PER_SECOND: u32 = 50;

/// What one pod may open at once and in a second, counting TCP only while nobody has answered. One pod that floods
/// fills a quarter of `OTHER_PLANS` at once, and pushes another's question out after two seconds at the soonest.
pub const POD_OPENINGS: u32 = PLANS / 4;
pub const POD_OPENINGS_PER_SECOND: u32 = PLANS / 8;
/// Rows of `TCP_WAYS` that one pod's connections may take before it opens no other: 65,536 connections, half as many
/// of those that leave with the node's address.
pub const POD_TCP_WAYS: u32 = TCP_WAYS / 4;
/// Conversations other than TCP that one pod is given ways for at once; as many more in [`STREAM_SECONDS`]. Those
/// beyond stay plans. One that leaves with the node's address counts twice.
pub const POD_STREAMS: u32 = OTHER_WAYS / 8;
/// How long a datagram's conversation keeps its ways without a packet.
pub const STREAM_SECONDS: u32 = 120;

/// Packets that one CPU may refuse with an answer at once, and how many it gains in a second; those above are dropped in
/// silence (RFC 1812 section 4.3.2.8, RFC 4443 section 2.4).
pub const REFUSAL_BURST: u32 = 200;
pub const REFUSALS_PER_SECOND: u32 = 1_000;

const _: () = assert!(BACKENDS >= 2 * LIVE);
const _: () = assert!(EVENTS_BYTES.is_power_of_two() && EVENTS_BYTES.is_multiple_of(4096));
