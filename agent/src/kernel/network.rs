//! Which network namespace this is, as programs see it.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// The kernel's cookie of the network namespace that we are in (`SO_NETNS_COOKIE`, Linux 5.14): what
/// `bpf_get_netns_cookie` says of a socket of it.
///
/// # Errors
/// The kernel does not know the option.
pub fn cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to live variables, of the sizes that are said.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_namespace_has_a_cookie_that_stays() {
        let cookie = super::cookie().unwrap();
        assert_ne!(cookie, 0);
        assert_eq!(super::cookie().unwrap(), cookie);
    }
}
