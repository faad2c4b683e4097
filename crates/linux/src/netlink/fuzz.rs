//! Mutated replies of the kernel: an answer or an error, never a panic. (The kernel is trusted; a version of it that we do not know
//! is not.)

use testkit::fuzz::Fuzz;

use super::{Attrs, Batch, F_ACK, Messages, refusal};
use crate::{conntrack, mountinfo, rtnl};

fn attributes(bytes: &[u8], depth: usize) {
    if depth > 0 {
        Attrs(bytes).for_each(|(_, value)| attributes(value, depth - 1));
    }
}

#[test]
fn replies() {
    let mut link = Batch::new();
    link.begin(16, F_ACK, "link").put(&[0; 16]).attr_str(3, "eth0").attr_u32(4, 1500).attr(1, &[1, 2, 3, 4, 5, 6]);
    link.nest(18, |batch| {
        batch.attr_str(1, "veth");
    });
    link.attr_u32(10, 7).attr_str(20, "alias");
    let mut address = Batch::new();
    address.begin(20, 0, "address").put(&[2, 24, 0, 0, 1, 0, 0, 0]).attr(1, &[10, 0, 0, 1]).attr(2, &[10, 0, 0, 1]);
    let mut refused = Batch::new();
    refused.begin(2, 0x200, "refused").put(&(-17i32).to_ne_bytes()).put(&[0; 16]).attr_str(1, "File exists");
    let mut both = link.encode().expect("small").to_vec();
    both.extend_from_slice(refused.encode().expect("small"));
    let seeds = [both, address.encode().expect("small").to_vec(), refused.encode().expect("small").to_vec()];
    let fuzz = seeds.into_iter().fold(Fuzz::new("netlink"), Fuzz::seed);
    fuzz.run(|input| {
        // Not longer than the datagram that it is in.
        let mut bytes = 0;
        for message in Messages(input).flatten() {
            bytes += message.payload.len();
            let _ = refusal(&message);
            let _ = (rtnl::parse_link(message.payload), rtnl::parse_address(message.payload), conntrack::parse(message.payload));
            attributes(message.payload, 4);
        }
        assert!(bytes <= input.len());
    });
}

#[test]
fn mounts() {
    let lines = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
                 37 36 0:5 / /a\\040b\\134 rw - tmpfs tmp\\012fs rw\n";
    Fuzz::new("mountinfo").seed(lines).words(&[" - ", "\\040", "\\999", "shared:"]).run(|input| {
        let _ = mountinfo::parse(&String::from_utf8_lossy(input));
    });
}
