//! ICMP errors: let through when they are about a live flow. Addresses inside and outside of an error
//! about a translated flow are passed on as they are, so its receiver will not recognise it.

use weir_common::DropReason;

use crate::flow;
use crate::l3::{Body, Extent, L3};
use crate::l4;
use crate::packet::Packet;
use crate::tables::Tables;
use crate::tuple::same;
use crate::verdict::Scratch;

/// Is the packet that an error quotes part of a live flow whose sender is the error's receiver? Leaves
/// the tuple of the quoted packet in `question`.
///
/// # Errors
/// [`DropReason::NoFlow`], and those of parsing the quotation.
#[inline(always)]
pub(crate) fn is_about_flow<F: L3>(
    packet: &impl Packet,
    tables: &impl Tables,
    body: &Body,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    let at = body.offset + 8;
    let quoted = &mut scratch.question;
    F::addresses(packet, at, quoted)?;
    let inner = F::body(packet, at, Extent::Quoted)?;
    l4::parse_quoted::<F>(packet, &inner, quoted)?;
    if !same(&quoted.source, &scratch.trace.tuple.destination) {
        return Err(DropReason::NoFlow);
    }
    quoted.write_key(&mut scratch.key);
    match flow::find(tables, quoted, &scratch.key) {
        Some(found) if !found.leads_to_backend() => Ok(()),
        _ => Err(DropReason::NoFlow),
    }
}
