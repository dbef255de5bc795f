//! The second lock as nf_tables knows it: one table with one chain with two rules. How it is asked for and
//! how it is recognised is from one description; no socket is here.

use std::ffi::CStr;

use netlink_bindings::nftables::{
    Chained, CmpOps, ExprOps, IterableExprListAttrs, MetaKeys, OpGetchainDo, OpGetruleDump,
    OpGettableDo, PushExprListAttrs, Registers, TableFlags, VerdictCode,
};
use netlink_bindings::traits::NetlinkRequest;
use netlink_bindings::utils::Pusher;
use weir_cni::attachment::DEVICE_PREFIX;
use weir_common::node::{PASSED_MARK, PASSED_MASK};
use weir_common::way::Mark;

use super::netfilter::{about, requests};

const FAMILY: i32 = libc::NFPROTO_INET;
const TABLE: &CStr = c"weir";
const CHAIN: &CStr = c"prerouting";
const KIND: &CStr = c"filter";
/// Before connection tracking, which starts at -200.
const PRIORITY: i32 = -300;
/// The register that every expression of the rule reads or writes.
const REGISTER: u32 = Registers::Reg1 as u32;

/// A part of a rule. Each works on the one register, or ends the rule for this packet.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Step {
    /// The register becomes this of the packet.
    Load(u32),
    /// These bits of the register stay.
    Mask(Vec<u8>),
    /// How the register begins, or the rule is not for this packet.
    Compare(u32, Vec<u8>),
    Count,
    Drop,
}

/// What a rule does, and what `nft list` shows beside it.
type Rule = (Vec<Step>, &'static CStr);

/// In words of nft:
///
/// ```text
/// iifname "weir*" meta mark & 0xf00 != 0xe00 counter drop
/// meta mark & 0xf00 == 0xe00 iifname != "weir*" meta mark & 0x3f00 != 0x2e00 counter drop
/// ```
///
/// What a pod has sent comes in by its own device. What bears the mark of that and comes in by another one was inside of it, in
/// whatever tunnel the node has, and is in anybody's name. But an answer to what was led on to another node comes in by the uplink, and
/// is marked as one there ([`Mark::REPLY`]); pods send no node such a thing.
fn rules() -> [Rule; 2] {
    // As long as the prefix only: what follows it may be anything.
    let by_a_pod = |how| {
        let prefix = DEVICE_PREFIX.as_bytes().to_vec();
        [
            Step::Load(MetaKeys::Iifname as u32),
            Step::Compare(how as u32, prefix),
        ]
    };
    let marked = |how, mask: u32, mark: u32| {
        [
            Step::Load(MetaKeys::Mark as u32),
            Step::Mask(mask.to_ne_bytes().to_vec()),
            Step::Compare(how as u32, mark.to_ne_bytes().to_vec()),
        ]
    };
    let is_marked = |how| marked(how, PASSED_MASK, PASSED_MARK);
    let is_no_reply = marked(CmpOps::Neq, Mark::MASK, Mark::REPLY.bits());
    let end = [Step::Count, Step::Drop];
    let unmarked = by_a_pod(CmpOps::Eq)
        .into_iter()
        .chain(is_marked(CmpOps::Neq));
    let inside = is_marked(CmpOps::Eq)
        .into_iter()
        .chain(by_a_pod(CmpOps::Neq))
        .chain(is_no_reply);
    [
        (
            unmarked.chain(end.clone()).collect(),
            c"no weir program has passed it",
        ),
        (
            inside.chain(end).collect(),
            c"it was inside of what a pod has sent",
        ),
    ]
}

/// Takes whatever has our table's name away and puts the lock there, in one transaction.
pub(super) fn replace() -> Chained<'static> {
    transaction(|batch| {
        remove_table(batch);
        add_table(batch);
        batch
            .request()
            .set_create()
            .op_newchain_do(&about(FAMILY))
            .encode()
            .push_table(TABLE)
            .push_name(CHAIN)
            .push_type(KIND)
            .push_policy(VerdictCode::Accept as u32)
            .nested_hook()
            .push_num(libc::NF_INET_PRE_ROUTING as u32)
            .push_priority(PRIORITY);
        for (steps, why) in rules() {
            let mut rule = batch
                .request()
                .set_create()
                .set_append()
                .op_newrule_do(&about(FAMILY));
            let mut expressions = rule
                .encode()
                .push_table(TABLE)
                .push_chain(CHAIN)
                .nested_expressions();
            for step in steps {
                expressions = step.push(expressions);
            }
            expressions.end_nested().push_userdata(&comment(why));
        }
    })
}

/// Takes the table away, also when there is none.
pub(super) fn remove() -> Chained<'static> {
    transaction(remove_table)
}

/// The table, by name.
pub(super) fn ask_table() -> Chained<'static> {
    let mut ask = requests();
    ask.request()
        .op_gettable_do(&about(FAMILY))
        .encode()
        .push_name(TABLE);
    ask
}

/// The chain, by name.
pub(super) fn ask_chain() -> Chained<'static> {
    let mut ask = requests();
    ask.request()
        .op_getchain_do(&about(FAMILY))
        .encode()
        .push_table(TABLE)
        .push_name(CHAIN);
    ask
}

/// All rules of the chain.
pub(super) fn ask_rules() -> Chained<'static> {
    let mut ask = requests();
    ask.request()
        .op_getrule_dump(&about(FAMILY))
        .encode()
        .push_table(TABLE)
        .push_chain(CHAIN);
    ask
}

/// Is it a table that is in force, with nothing but one chain?
pub(super) fn is_table(answer: &[u8]) -> bool {
    let (_, table) = OpGettableDo::decode_reply(answer);
    let asleep = TableFlags::Dormant as u32;
    table.get_use().is_ok_and(|chains| chains == 1)
        && table.get_flags().is_ok_and(|flags| flags & asleep == 0)
}

/// Is it hooked where the lock is?
pub(super) fn is_chain(answer: &[u8]) -> bool {
    let (_, chain) = OpGetchainDo::decode_reply(answer);
    let Ok(hook) = chain.get_hook() else {
        return false;
    };
    hook.get_num() == Ok(libc::NF_INET_PRE_ROUTING as u32)
        && hook.get_priority() == Ok(PRIORITY)
        && chain.get_type() == Ok(KIND)
        && chain.get_policy() == Ok(VerdictCode::Accept as u32)
}

/// The packets that the rules have dropped, if these are the rules of the lock: ours, in their order, and no others.
pub(super) fn drops(found: &[Vec<u8>]) -> Option<u64> {
    let ours = rules();
    if found.len() != ours.len() {
        return None;
    }
    let mut dropped = 0;
    for (answer, (steps, _)) in found.iter().zip(ours) {
        let (_, rule) = OpGetruleDump::decode_reply(answer);
        let (found, packets) = read(&rule.get_expressions().ok()?)?;
        if found != steps {
            return None;
        }
        dropped += packets;
    }
    Some(dropped)
}

/// Nothing in it, or all of it, is done.
fn transaction(changes: impl FnOnce(&mut Chained<'static>)) -> Chained<'static> {
    let mut subsystem = about(libc::AF_UNSPEC);
    subsystem.set_res_id(libc::NFNL_SUBSYS_NFTABLES as u16);
    let mut batch = requests();
    batch.request().op_batch_begin_do(&subsystem);
    changes(&mut batch);
    batch.request().op_batch_end_do(&subsystem);
    batch
}

/// Adds it first: to delete what is not there would fail.
fn remove_table(batch: &mut Chained<'static>) {
    add_table(batch);
    batch
        .request()
        .op_deltable_do(&about(FAMILY))
        .encode()
        .push_name(TABLE);
}

fn add_table(batch: &mut Chained<'static>) {
    batch
        .request()
        .set_create()
        .op_newtable_do(&about(FAMILY))
        .encode()
        .push_name(TABLE)
        .push_flags(0);
}

/// As nft keeps a comment in a rule's user data: type 0, length, text with its end.
fn comment(text: &CStr) -> Vec<u8> {
    let text = text.to_bytes_with_nul();
    // It is shorter than 256 bytes.
    [&[0, text.len() as u8], text].concat()
}

impl Step {
    fn push<Prev: Pusher>(&self, list: PushExprListAttrs<Prev>) -> PushExprListAttrs<Prev> {
        let expression = list.nested_elem();
        match self {
            Self::Load(key) => expression
                .nested_data_meta()
                .push_key(*key)
                .push_dreg(REGISTER)
                .end_nested()
                .end_nested(),
            Self::Mask(bits) => expression
                .nested_data_bitwise()
                .push_sreg(REGISTER)
                .push_dreg(REGISTER)
                // Kernels before 5.6 know no other operation, and no number for it.
                .push_op(0)
                .push_len(bits.len() as u32)
                .nested_mask()
                .push_value(bits)
                .end_nested()
                .nested_xor()
                .push_value(&vec![0; bits.len()])
                .end_nested()
                .end_nested()
                .end_nested(),
            Self::Compare(how, with) => expression
                .nested_data_cmp()
                .push_sreg(REGISTER)
                .push_op(*how)
                .nested_data()
                .push_value(with)
                .end_nested()
                .end_nested()
                .end_nested(),
            Self::Count => expression.nested_data_counter().end_nested().end_nested(),
            Self::Drop => expression
                .nested_data_immediate()
                .push_dreg(Registers::RegVerdict as u32)
                .nested_data()
                .nested_verdict()
                .push_code(VerdictCode::Drop as u32)
                .end_nested()
                .end_nested()
                .end_nested()
                .end_nested(),
        }
    }

    /// None for an expression that no rule of ours has.
    fn read(expression: &ExprOps<'_>) -> Option<Self> {
        let ours = |register: u32| (register == REGISTER).then_some(());
        match expression {
            ExprOps::Meta(meta) => {
                ours(meta.get_dreg().ok()?)?;
                meta.get_key().ok().map(Self::Load)
            }
            ExprOps::Bitwise(bits) => {
                ours(bits.get_sreg().ok()?)?;
                ours(bits.get_dreg().ok()?)?;
                let flipped = bits.get_xor().ok()?.get_value().ok()?;
                let is_mask = bits.get_op().unwrap_or(0) == 0 && flipped.iter().all(|it| *it == 0);
                let mask = bits.get_mask().ok()?.get_value().ok()?;
                is_mask.then(|| Self::Mask(mask.to_vec()))
            }
            ExprOps::Cmp(compare) => {
                ours(compare.get_sreg().ok()?)?;
                let with = compare.get_data().ok()?.get_value().ok()?;
                Some(Self::Compare(compare.get_op().ok()?, with.to_vec()))
            }
            ExprOps::Counter(_) => Some(Self::Count),
            ExprOps::Immediate(to) => {
                let verdict = to.get_data().ok()?.get_verdict().ok()?;
                let is_drop = to.get_dreg() == Ok(Registers::RegVerdict as u32)
                    && verdict.get_code() == Ok(VerdictCode::Drop as u32);
                is_drop.then_some(Self::Drop)
            }
            _ => None,
        }
    }
}

/// What a rule does, and the packets that it counted.
fn read(expressions: &IterableExprListAttrs<'_>) -> Option<(Vec<Step>, u64)> {
    let mut steps = Vec::new();
    let mut packets = 0;
    for expression in expressions.get_elem() {
        let expression = expression.get_data().ok()?;
        if let ExprOps::Counter(counter) = &expression {
            packets = counter.get_packets().ok()?;
        }
        steps.push(Step::read(&expression)?);
    }
    Some((steps, packets))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table, chain and rule of the transaction, each without its header.
    fn sent() -> Vec<Vec<u8>> {
        let batch = replace().finalize();
        let mut rest = batch.buf().as_slice();
        let mut contents = Vec::new();
        while let Some(length) = rest.first_chunk() {
            let length = u32::from_ne_bytes(*length) as usize;
            contents.push(rest[16..length].to_vec());
            rest = &rest[length.next_multiple_of(4)..];
        }
        contents
    }

    /// What nft 1.0.6 sends to a little-endian kernel for this rule (`nft --debug=mnl`): family, table and chain,
    /// then the expressions one by one, then the comment.
    const RULE: &str = "01000000 \
        09000100 77656972 00000000 0f000200 70726572 6f757469 6e670000 34010480 \
        24000180 09000100 6d657461 00000000 14000280 08000200 00000006 08000100 00000001 \
        2c000180 08000100 636d7000 20000280 08000100 00000001 08000200 00000000 \
        0c000380 08000100 77656972 \
        24000180 09000100 6d657461 00000000 14000280 08000200 00000003 08000100 00000001 \
        4c000180 0c000100 62697477 69736500 3c000280 08000100 00000001 08000200 00000001 \
        08000600 00000000 08000300 00000004 0c000480 08000100 000f0000 \
        0c000580 08000100 00000000 \
        2c000180 08000100 636d7000 20000280 08000100 00000001 08000200 00000001 \
        0c000380 08000100 000e0000 \
        14000180 0c000100 636f756e 74657200 04000280 \
        30000180 0e000100 696d6d65 64696174 65000000 1c000280 08000100 00000000 \
        10000280 0c000280 08000100 00000000 \
        24000700 001e6e6f 20776569 72207072 6f677261 6d206861 73207061 73736564 20697400";

    #[cfg(target_endian = "little")]
    #[test]
    fn the_rule_is_byte_for_byte_what_nft_sends() {
        let contents = sent();
        // The transaction begins, three times a table, the chain, the rules, and it ends.
        assert_eq!(contents.len(), 8);
        let hex: String = contents[5]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, RULE.replace(' ', ""));
    }

    /// What the kernel says of a rule of these steps that has counted seven packets.
    fn answer(steps: &[Step]) -> Vec<u8> {
        let mut answer = Vec::new();
        let rule = OpGetruleDump::encode_request(&mut answer, &about(FAMILY));
        let mut list = rule.nested_expressions();
        for step in steps {
            list = match step {
                Step::Count => list
                    .nested_elem()
                    .nested_data_counter()
                    .push_bytes(500)
                    .push_packets(7)
                    .end_nested()
                    .end_nested(),
                other => other.push(list),
            };
        }
        list.end_nested().end_nested();
        answer
    }

    #[test]
    fn the_lock_is_exactly_our_two_rules() {
        let [(first, _), (second, _)] = rules();
        let ours = [&first, &second].map(|it| answer(it));
        let [one, other] = ours.clone();
        assert_eq!(drops(&ours), Some(14));
        assert_eq!(drops(&[]), None);
        assert_eq!(drops(std::slice::from_ref(&one)), None);
        assert_eq!(drops(&[other.clone(), one.clone()]), None);
        assert_eq!(drops(&[one.clone(), other.clone(), other.clone()]), None);
        assert_eq!(
            drops(&[one[..one.len() - 60].to_vec(), other.clone()]),
            None
        );
        for at in 0..first.len() {
            let [mut fewer, mut less] = [first.clone(), second.clone()];
            fewer.remove(at);
            less.remove(at);
            let without = [answer(&fewer), other.clone()];
            assert_eq!(drops(&without), None, "without {at}");
            let without = [one.clone(), answer(&less)];
            assert_eq!(drops(&without), None, "without {at}");
        }
    }
}
