//! From an outcome to the bytes of a response, within the size that the client can take.

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::HINFO;
use hickory_proto::rr::{RData, Record};
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};

use crate::request::{MAX_UDP, Rejection, Request};

/// Seconds; an ANY answer says nothing that could change.
const ANY_TTL: u32 = 3600;

/// What a response says.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    pub code: Option<ResponseCode>,
    /// The answer is about our own zone.
    pub authority: Authority,
    pub answers: Vec<Record>,
    pub authorities: Vec<Record>,
    pub additionals: Vec<Record>,
}

/// Who says so.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Authority {
    /// We do.
    Own,
    /// We heard it.
    #[default]
    Other,
}

impl Reply {
    /// A response without records.
    pub fn error(code: ResponseCode) -> Self {
        Self {
            code: Some(code),
            ..Self::default()
        }
    }

    /// The code of the response.
    pub fn code(&self) -> ResponseCode {
        self.code.unwrap_or(ResponseCode::NoError)
    }

    /// The bytes of the response, at most `limit` of them; TC is set when records had to be left
    /// out. Beside answers, the other sections go first, without TC: nobody asked for them.
    pub fn encode(self, request: &Request, limit: u16) -> Vec<u8> {
        let mut message = Message::new(
            request.metadata.id,
            MessageType::Response,
            request.metadata.op_code,
        );
        message.metadata = response_metadata(&request.metadata, self.code());
        message.metadata.authoritative = self.authority == Authority::Own;
        message.add_query(request.query.clone());
        if request.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(MAX_UDP);
            message.set_edns(edns);
        }
        message.answers = self.answers;
        message.authorities = self.authorities;
        message.additionals = self.additionals;
        let mut bytes = emit(&message, limit);
        if is_truncated(&bytes) && !message.answers.is_empty() {
            message.additionals.clear();
            message.authorities.clear();
            bytes = emit(&message, limit);
        }
        if is_truncated(&bytes) && message.edns.is_some() {
            // The encoder filled the room of the OPT record with answers: give one back.
            let kept = bytes.get(6..8).map_or(0, |count| {
                usize::from(u16::from_be_bytes([count[0], count[1]]))
            });
            message.answers.truncate(kept.saturating_sub(1));
            message.metadata.truncation = true;
            bytes = emit(&message, limit);
        }
        match bytes.is_empty() {
            true => header(&request.metadata, ResponseCode::ServFail),
            false => bytes,
        }
    }
}

/// The response to what the filter did not let through; none if there should not be one.
pub fn reject(rejection: Rejection, limit: impl Fn(&Request) -> u16) -> Option<Vec<u8>> {
    match rejection {
        Rejection::Silent => None,
        Rejection::Header(metadata, code) => Some(header(&metadata, code)),
        Rejection::Question(request, code) => {
            let limit = limit(&request);
            Some(Reply::error(code).encode(&request, limit))
        }
        Rejection::Any(request) => {
            let limit = limit(&request);
            let minimal = RData::HINFO(HINFO::new("RFC8482".to_owned(), String::new()));
            let reply = Reply {
                answers: vec![Record::from_rdata(
                    request.query.name().clone(),
                    ANY_TTL,
                    minimal,
                )],
                ..Reply::default()
            };
            Some(reply.encode(&request, limit))
        }
    }
}

/// The response to a request that brought us down: all that is certain is its id.
pub fn servfail(bytes: &[u8]) -> Option<Vec<u8>> {
    let id = bytes.first_chunk::<2>()?;
    let metadata = Metadata::new(u16::from_be_bytes(*id), MessageType::Query, OpCode::Query);
    Some(header(&metadata, ResponseCode::ServFail))
}

fn response_metadata(request: &Metadata, code: ResponseCode) -> Metadata {
    let mut metadata = Metadata::response_from_request(request);
    metadata.recursion_available = true;
    metadata.response_code = code;
    metadata
}

fn header(request: &Metadata, code: ResponseCode) -> Vec<u8> {
    let mut message = Message::new(request.id, MessageType::Response, request.op_code);
    message.metadata = response_metadata(request, code);
    emit(&message, MAX_UDP)
}

fn emit(message: &Message, limit: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(512);
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(limit);
    match message.emit(&mut encoder) {
        Ok(()) => bytes,
        Err(_) => Vec::new(),
    }
}

fn is_truncated(bytes: &[u8]) -> bool {
    bytes.get(2).is_some_and(|flags| flags & 0x02 != 0)
}
