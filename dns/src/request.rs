//! The filter that every request passes before anything else sees it, on every transport: one
//! question, of class IN, that may be asked. What it lets through is small and known.

use hickory_proto::op::{Edns, Message, Metadata, OpCode, ResponseCode};
use hickory_proto::op::{MessageType, Query};
use hickory_proto::rr::{DNSClass, RecordType};

/// The largest datagram that crosses any network in one piece (DNS flag day 2020), in bytes.
pub const MAX_UDP: u16 = 1232;
/// What a client without EDNS takes (RFC 1035 4.2.1), in bytes.
const PLAIN_UDP: u16 = 512;
const HEADER: usize = 12;

/// A question that may be asked.
#[derive(Clone, Debug)]
pub struct Request {
    pub metadata: Metadata,
    pub query: Query,
    /// The client speaks EDNS.
    pub edns: Option<Edns>,
}

/// What becomes of bytes that are no such question.
#[derive(Debug)]
pub enum Rejection {
    /// Answering would make us a part of somebody's reflection.
    Silent,
    /// The header alone is known.
    Header(Metadata, ResponseCode),
    Question(Box<Request>, ResponseCode),
    /// ANY is answered with next to nothing (RFC 8482).
    Any(Box<Request>),
}

impl Request {
    /// Reads a message. Sections are counted before they are read (CVE-2026-82399).
    pub fn read(bytes: &[u8]) -> Result<Self, Rejection> {
        let Some(header) = bytes.first_chunk::<HEADER>() else {
            return Err(Rejection::Silent);
        };
        let field = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let flags = field(2);
        if flags & 0x8000 != 0 {
            return Err(Rejection::Silent);
        }
        let op_code = OpCode::from_u8(((flags >> 11) & 0xf) as u8);
        let mut metadata = Metadata::new(field(0), MessageType::Query, op_code);
        metadata.recursion_desired = flags & 0x0100 != 0;
        metadata.checking_disabled = flags & 0x0010 != 0;
        if op_code != OpCode::Query {
            return Err(Rejection::Header(metadata, ResponseCode::NotImp));
        }
        let (questions, answers, authorities, additionals) =
            (field(4), field(6), field(8), field(10));
        if questions != 1 || answers != 0 || authorities != 0 || additionals > 2 {
            return Err(Rejection::Header(metadata, ResponseCode::FormErr));
        }
        let Ok(message) = Message::from_vec(bytes) else {
            return Err(Rejection::Header(metadata, ResponseCode::FormErr));
        };
        let Ok([query]) = <[Query; 1]>::try_from(message.queries) else {
            return Err(Rejection::Header(metadata, ResponseCode::FormErr));
        };
        let request = Self {
            metadata,
            query,
            edns: message.edns,
        };
        if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return Err(Rejection::Question(
                Box::new(request),
                ResponseCode::BADVERS,
            ));
        }
        if request.query.query_class() != DNSClass::IN {
            return Err(Rejection::Question(
                Box::new(request),
                ResponseCode::Refused,
            ));
        }
        match u16::from(request.query.query_type()) {
            RECORD_ANY => Err(Rejection::Any(Box::new(request))),
            RECORD_OPT => Err(Rejection::Question(
                Box::new(request),
                ResponseCode::FormErr,
            )),
            // Zone transfers, and everything else that is not the type of a record (RFC 6895 3.1).
            128..=255 | 0 => Err(Rejection::Question(
                Box::new(request),
                ResponseCode::Refused,
            )),
            _ => Ok(request),
        }
    }

    /// How long an answer over UDP may be, in bytes.
    pub fn udp_limit(&self) -> u16 {
        match &self.edns {
            Some(edns) => edns.max_payload().clamp(PLAIN_UDP, MAX_UDP),
            None => PLAIN_UDP,
        }
    }

    /// The type asked for.
    pub fn kind(&self) -> RecordType {
        self.query.query_type()
    }
}

const RECORD_ANY: u16 = 255;
const RECORD_OPT: u16 = 41;

#[cfg(test)]
mod tests {
    use hickory_proto::op::Message;
    use hickory_proto::rr::Name;
    use proptest::prelude::*;

    use super::*;

    fn question(class: DNSClass, kind: RecordType) -> Vec<u8> {
        let mut query = Query::query(Name::from_ascii("web.default.").unwrap(), kind);
        query.set_query_class(class);
        let mut message = Message::query();
        message.add_query(query);
        message.to_vec().unwrap()
    }

    fn fate(bytes: &[u8]) -> String {
        match Request::read(bytes) {
            Ok(_) => "passes".to_owned(),
            Err(Rejection::Silent) => "silent".to_owned(),
            Err(Rejection::Header(_, code)) => format!("header {code:?}"),
            Err(Rejection::Question(_, code)) => format!("question {code:?}"),
            Err(Rejection::Any(_)) => "any".to_owned(),
        }
    }

    #[test]
    fn only_one_plain_question_passes() {
        let plain = question(DNSClass::IN, RecordType::A);
        let with = |at: usize, value: u8| {
            let mut bytes = plain.clone();
            bytes[at] = value;
            bytes
        };
        let table = [
            ("plain", plain.clone(), "passes"),
            ("no bytes", vec![], "silent"),
            ("half a header", plain[..11].to_vec(), "silent"),
            ("a response", with(2, 0x80), "silent"),
            ("an update", with(2, 0x28), "header NotImp"),
            ("a notify", with(2, 0x20), "header NotImp"),
            ("no question", with(5, 0), "header FormErr"),
            ("two questions", with(5, 2), "header FormErr"),
            ("65,280 questions", with(4, 0xff), "header FormErr"),
            ("an answer", with(7, 1), "header FormErr"),
            ("an authority", with(9, 1), "header FormErr"),
            ("65,280 additionals", with(10, 0xff), "header FormErr"),
            (
                "cut off",
                plain[..plain.len() - 1].to_vec(),
                "header FormErr",
            ),
            (
                "CHAOS",
                question(DNSClass::CH, RecordType::TXT),
                "question Refused",
            ),
            (
                "any class",
                question(DNSClass::ANY, RecordType::A),
                "question Refused",
            ),
            (
                "AXFR",
                question(DNSClass::IN, RecordType::AXFR),
                "question Refused",
            ),
            (
                "IXFR",
                question(DNSClass::IN, RecordType::IXFR),
                "question Refused",
            ),
            ("ANY", question(DNSClass::IN, RecordType::ANY), "any"),
            (
                "OPT",
                question(DNSClass::IN, RecordType::OPT),
                "question FormErr",
            ),
            (
                "an unknown type",
                question(DNSClass::IN, RecordType::Unknown(999)),
                "passes",
            ),
        ];
        for (name, bytes, expected) in table {
            assert_eq!(fate(&bytes), expected, "{name}");
        }
    }

    #[test]
    fn a_name_that_points_at_itself_is_malformed() {
        let mut bytes = question(DNSClass::IN, RecordType::A);
        bytes.truncate(HEADER);
        bytes.extend([0xc0, 12, 0, 1, 0, 1]);
        assert_eq!(fate(&bytes), "header FormErr");
    }

    proptest! {
        #[test]
        fn random_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            fate(&bytes);
        }

        #[test]
        fn a_question_with_random_damage_does_not_panic(
            at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>()
        ) {
            let mut bytes = question(DNSClass::IN, RecordType::A);
            let place = at.index(bytes.len());
            bytes[place] = value;
            fate(&bytes[..cut.index(bytes.len())]);
            fate(&bytes);
        }
    }
}
