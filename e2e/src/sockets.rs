//! The sockets of a network namespace that somebody may connect to or send to, out of `/proc/PID/net` (proc_net(5)).

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};

/// `TCP_LISTEN` as `/proc/net/tcp` prints it.
const LISTEN: &str = "0A";
/// The flag of a unix socket that listens (`__SO_ACCEPTCON`).
const ACCEPTS: u64 = 0x1_0000;
/// `SOCK_DGRAM` as `/proc/net/unix` prints it: such a socket is sent to without being listened on.
const DATAGRAM: &str = "0002";

/// What can be reached from outside of the process that made it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sockets {
    /// Listening TCP sockets.
    pub tcp: BTreeSet<SocketAddr>,
    /// Bound UDP sockets.
    pub udp: BTreeSet<SocketAddr>,
    /// Unix sockets that listen or take datagrams, by name; those in the abstract namespace begin with `@`.
    pub unix: BTreeSet<String>,
}

impl Sockets {
    /// Reads those of the namespace that a process is in.
    pub(crate) fn read(pid: u32) -> Result<Sockets> {
        let file = |name: &str| {
            let path = format!("/proc/{pid}/net/{name}");
            fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))
        };
        let mut sockets = Sockets { unix: unix(&file("unix")?), ..Sockets::default() };
        for name in ["tcp", "tcp6"] {
            sockets.tcp.extend(inet(&file(name)?).filter(|(_, state)| state == LISTEN).map(|(address, _)| address));
        }
        for name in ["udp", "udp6"] {
            sockets.udp.extend(inet(&file(name)?).map(|(address, _)| address));
        }
        Ok(sockets)
    }
}

/// Local address and state of each line.
fn inet(table: &str) -> impl Iterator<Item = (SocketAddr, String)> {
    table.lines().skip(1).filter_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, _remote, state) = (words.next()?, words.next()?, words.next()?);
        Some((address(local)?, state.to_owned()))
    })
}

/// `0100007F:192B`: the address in words of the machine's byte order, the port as a number.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let words: Option<Vec<u8>> = (0..ip.len() / 8)
        .map(|word| u32::from_str_radix(ip.get(word * 8..word * 8 + 8)?, 16).ok())
        .collect::<Option<Vec<u32>>>()
        .map(|words| words.into_iter().flat_map(u32::to_ne_bytes).collect());
    let words = words?;
    let ip: IpAddr = match words.len() {
        4 => Ipv4Addr::from(<[u8; 4]>::try_from(words).ok()?).into(),
        16 => Ipv6Addr::from(<[u8; 16]>::try_from(words).ok()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

fn unix(table: &str) -> BTreeSet<String> {
    let named = table.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (flags, kind, name) = (words.get(3)?, words.get(4)?, words.get(7)?);
        let accepts = u64::from_str_radix(flags, 16).ok()? & ACCEPTS != 0;
        (accepts || *kind == DATAGRAM).then(|| (*name).to_owned())
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let tcp = "  sl  local_address rem_address   st\n   0: 0100007F:192B 00000000:0000 0A 0\n   1: 0100007F:A000 0100007F:192B 01 0\n";
        let seen: Vec<_> = inet(tcp).collect();
        assert_eq!(seen[0], ("127.0.0.1:6443".parse().expect("an address"), "0A".to_owned()));
        assert_eq!(seen.len(), 2);
        assert_eq!(address("00000000000000000000000000000000:280A"), "[::]:10250".parse().ok());
    }

    #[test]
    fn unix_sockets_that_listen_or_take_datagrams() {
        let table = "Num RefCount Protocol Flags Type St Inode Path\n\
            0: 00000002 00000000 00010000 0001 01 11 /run/a.sock\n\
            1: 00000003 00000000 00000000 0001 03 12 /run/a.sock\n\
            2: 00000002 00000000 00010000 0001 01 13 @abstract\n\
            3: 00000002 00000000 00000000 0002 01 14 /run/log\n\
            4: 00000003 00000000 00000000 0001 03 15\n";
        assert_eq!(unix(table).into_iter().collect::<Vec<_>>(), ["/run/a.sock", "/run/log", "@abstract"]);
    }
}
