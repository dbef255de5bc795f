//! The rows of Services as the kernel's programs find them, and of conversations that are known, read from the pinned
//! tables.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::path::Path;

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use weir_common::event::Hook;
use weir_common::service::{Backend, Frontend, FrontendKey, Scope};
use weir_common::table::TABLES;
use weir_common::way::{Peer, Rewrite, Way, WayKey};
use weir_common::{Addr, Port, Protocol};
use zerocopy::{FromBytes, IntoBytes};

/// The tables that a Service is in, and its connections.
pub(crate) struct Tables {
    frontends: HashMap<MapData, [u8; size_of::<FrontendKey>()], [u8; size_of::<Frontend>()]>,
    backends: Array<MapData, [u8; size_of::<Backend>()]>,
    ways: HashMap<MapData, [u8; size_of::<WayKey>()], [u8; size_of::<Way>()]>,
}

impl Tables {
    /// # Errors
    /// Nothing is pinned there, or another layout.
    pub(crate) fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self {
            frontends: pinned(bpffs, "FRONTENDS")?.try_into()?,
            backends: pinned(bpffs, "BACKENDS")?.try_into()?,
            ways: pinned(bpffs, "TCP_WAYS")?.try_into()?,
        })
    }

    /// Where connections to a service may go now, and where the row with that begins; `None` if the address
    /// is no service's.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub(crate) fn frontend(&self, address: Ipv4Addr, port: u16) -> Result<Option<Frontend>> {
        let mut key = [0; size_of::<FrontendKey>()];
        key.copy_from_slice(
            FrontendKey {
                addr: Addr::from(IpAddr::V4(address)),
                port: Port::from(port),
                protocol: Protocol::TCP,
                scope: Scope::INTERNAL,
                pad: [0; 4],
            }
            .as_bytes(),
        );
        match self.frontends.get(&key, 0) {
            Ok(row) => Ok(Some(Frontend::read_from_bytes(&row).ok().context("a row")?)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("read FRONTENDS"),
        }
    }

    /// In which row of those that a service may lead to an address is.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub(crate) fn place_of(&self, frontend: &Frontend, address: Ipv4Addr) -> Result<Option<u32>> {
        let segment = frontend.segment;
        for index in segment.start..segment.start + segment.len {
            if self.is_at(index, address)? {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    /// The ways of TCP connections that arrive at a hook with one address and leave it to another; they are the same where
    /// nothing is translated. What is closed on both sides is forgotten at once.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub(crate) fn ways(
        &self,
        hook: Hook,
        to: SocketAddrV4,
        leads: SocketAddrV4,
    ) -> Result<Vec<Way>> {
        let peer = |it: SocketAddrV4| Peer {
            addr: Addr::from(IpAddr::V4(*it.ip())),
            port: Port::from(it.port()),
        };
        let (to, leads) = (peer(to), peer(leads));
        let mut found = Vec::new();
        for row in self.ways.iter() {
            let (key, way) = row.context("read TCP_WAYS")?;
            let key = WayKey::read_from_bytes(&key).ok().context("a key")?;
            let way = Way::read_from_bytes(&way).ok().context("a row")?;
            let after = match way.step.rewrite {
                Rewrite::DESTINATION => Peer {
                    addr: way.step.addr,
                    port: way.step.port,
                },
                _ => key.destination(),
            };
            if key.hook == hook && key.destination() == to && after == leads {
                found.push(way);
            }
        }
        Ok(found)
    }

    /// Is an address in that row?
    ///
    /// # Errors
    /// The kernel does not answer.
    pub(crate) fn is_at(&self, index: u32, address: Ipv4Addr) -> Result<bool> {
        let row = self.backends.get(&index, 0).context("read BACKENDS")?;
        let backend = Backend::read_from_bytes(&row).ok().context("a row")?;
        Ok(backend.addr == Addr::from(IpAddr::V4(address)))
    }
}

fn pinned(bpffs: &Path, name: &str) -> Result<Map> {
    let table = TABLES.iter().find(|table| table.name == name);
    let table = table.with_context(|| format!("a table {name}"))?;
    let path = bpffs.join(format!("{}_v{}", table.name, table.version));
    let data = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
    Map::from_map_data(data).with_context(|| format!("read the sort of {}", path.display()))
}
