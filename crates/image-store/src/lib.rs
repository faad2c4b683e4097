//! Images: distribution, content, unpack, snapshots.
