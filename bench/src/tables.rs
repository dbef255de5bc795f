//! The rows of Services as the kernel's programs find them, read from the pinned tables.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use weir_common::service::{Backend, Frontend, FrontendKey, Scope};
use weir_common::table::TABLES;
use weir_common::{Addr, Port, Protocol};
use zerocopy::{FromBytes, IntoBytes};

/// The tables that a Service is in.
pub(crate) struct Tables {
    frontends: HashMap<MapData, [u8; size_of::<FrontendKey>()], [u8; size_of::<Frontend>()]>,
    backends: Array<MapData, [u8; size_of::<Backend>()]>,
}

impl Tables {
    /// # Errors
    /// Nothing is pinned there, or another layout.
    pub(crate) fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self {
            frontends: pinned(bpffs, "FRONTENDS")?.try_into()?,
            backends: pinned(bpffs, "BACKENDS")?.try_into()?,
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
