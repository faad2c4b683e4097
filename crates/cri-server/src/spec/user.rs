//! Who a container's process is: CRI's security context and the image's user, looked up in the image's own
//! `/etc/passwd` and `/etc/group`. Pure.
//!
//! Source: containerd v2.4.2, `internal/cri/util/strings.go` (user string), `pkg/oci/spec_opts.go` (lookups).

use std::collections::BTreeSet;

use protocols::cri::v1::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};

use super::SpecError;
use crate::oci::User;

/// The two files of a root file system that users are looked up in; an absent file is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserFiles {
    /// The text of `/etc/passwd`.
    pub passwd: Option<String>,
    /// The text of `/etc/group`.
    pub group: Option<String>,
}

const ID_MAX: u32 = i32::MAX as u32;

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl UserFiles {
    /// How large they are.
    pub fn bytes(&self) -> usize {
        self.passwd.iter().chain(&self.group).map(String::len).sum()
    }

    fn users(&self) -> impl Iterator<Item = PasswdEntry<'_>> {
        self.passwd.iter().flat_map(|text| text.lines()).filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
            let uid = id(fields.nth(1)?)?;
            let gid = id(fields.next()?)?;
            Some(PasswdEntry { name, uid, gid })
        })
    }

    fn groups(&self) -> impl Iterator<Item = GroupEntry<'_>> {
        self.group.iter().flat_map(|text| text.lines()).filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
            let gid = id(fields.nth(1)?)?;
            Some(GroupEntry { name, gid, members: fields.next().unwrap_or("") })
        })
    }
}

/// The user of a container's process.
///
/// A user name must be in `/etc/passwd` and a group name in `/etc/group`; a uid that is not there has gid 0.
/// The supplemental groups always hold the primary one, and under the policy `Merge` those of the image's `/etc/group`.
///
/// # Errors
/// [`SpecError::User`]: the name is unknown, a number is out of range, or a group comes without a user.
pub fn resolve(context: &LinuxContainerSecurityContext, image_user: &str, files: &UserFiles) -> Result<User, SpecError> {
    let wanted = wanted(context, image_user)?;
    let (user, group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (wanted.as_str(), None),
    };
    let (uid, primary, name) = lookup_user(user, files)?;
    let gid = match group {
        None => primary,
        Some(group) => lookup_group(group, files)?,
    };
    let mut groups: BTreeSet<u32> = BTreeSet::from([gid]);
    if policy(context)? == SupplementalGroupsPolicy::Merge
        && let Some(name) = name
    {
        groups.extend(
            files
                .groups()
                .filter(|entry| entry.name != name && entry.members.split(',').any(|member| member == name))
                .map(|entry| entry.gid),
        );
    }
    for group in &context.supplemental_groups {
        groups.insert(number(*group, "supplemental_groups")?);
    }
    Ok(User { uid, gid, additional_gids: groups.into_iter().collect() })
}

fn policy(context: &LinuxContainerSecurityContext) -> Result<SupplementalGroupsPolicy, SpecError> {
    SupplementalGroupsPolicy::try_from(context.supplemental_groups_policy)
        .map_err(|_| SpecError::User(format!("supplemental_groups_policy {} is not known", context.supplemental_groups_policy)))
}

/// `USER[:GROUP]` out of the request, else out of the image, else root.
fn wanted(context: &LinuxContainerSecurityContext, image_user: &str) -> Result<String, SpecError> {
    let user = if context.run_as_username.is_empty() {
        context.run_as_user.as_ref().map(|uid| number(uid.value, "run_as_user")).transpose()?.map(|uid| uid.to_string())
    } else {
        Some(context.run_as_username.clone())
    };
    let group = context.run_as_group.as_ref().map(|gid| number(gid.value, "run_as_group")).transpose()?;
    match (user, group) {
        (Some(user), Some(group)) => Ok(format!("{user}:{group}")),
        (Some(user), None) => Ok(user),
        (None, Some(group)) => Err(SpecError::User(format!("run_as_group {group} is given without a user"))),
        (None, None) if image_user.is_empty() => Ok("0".to_owned()),
        (None, None) => Ok(image_user.to_owned()),
    }
}

/// A user's or group's id: 0 to 2147483647, as containerd's. What is beyond may be -1 to a system call, which leaves root what it is.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= ID_MAX)
}

fn number(value: i64, field: &str) -> Result<u32, SpecError> {
    let id = u32::try_from(value).ok().filter(|id| *id <= ID_MAX);
    id.ok_or_else(|| SpecError::User(format!("{field} {value} is not an id")))
}

/// Uid, primary gid, and the name where there is one.
fn lookup_user<'a>(user: &str, files: &'a UserFiles) -> Result<(u32, u32, Option<&'a str>), SpecError> {
    if let Some(uid) = id(user) {
        return Ok(match files.users().find(|entry| entry.uid == uid) {
            Some(entry) => (uid, entry.gid, Some(entry.name)),
            None => (uid, 0, None),
        });
    }
    files
        .users()
        .find(|entry| entry.name == user)
        .map(|entry| (entry.uid, entry.gid, Some(entry.name)))
        .ok_or_else(|| SpecError::User(format!("no user {user:?} in the image's /etc/passwd")))
}

fn lookup_group(group: &str, files: &UserFiles) -> Result<u32, SpecError> {
    if let Some(gid) = id(group) {
        return Ok(gid);
    }
    files
        .groups()
        .find(|entry| entry.name == group)
        .map(|entry| entry.gid)
        .ok_or_else(|| SpecError::User(format!("no group {group:?} in the image's /etc/group")))
}

#[cfg(test)]
mod tests {
    use protocols::cri::v1::Int64Value;

    use super::*;

    fn files() -> UserFiles {
        UserFiles {
            passwd: Some("root:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/:\n#c:x:1:1\nbad\n".into()),
            group: Some("root:x:0:\nwww:x:34:www\nlog:x:50:root,www\nmine:x:60:other\n".into()),
        }
    }

    fn context(uid: Option<i64>, gid: Option<i64>, name: &str, groups: &[i64]) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext {
            run_as_user: uid.map(|value| Int64Value { value }),
            run_as_group: gid.map(|value| Int64Value { value }),
            run_as_username: name.to_owned(),
            supplemental_groups: groups.to_vec(),
            ..LinuxContainerSecurityContext::default()
        }
    }

    fn ids(user: &User) -> (u32, u32, &[u32]) {
        (user.uid, user.gid, &user.additional_gids)
    }

    #[test]
    fn users_are_found_as_containerd_finds_them() {
        type Case<'a> = (LinuxContainerSecurityContext, &'a str, (u32, u32, &'a [u32]));
        let cases: &[Case<'_>] = &[
            (context(None, None, "", &[]), "", (0, 0, &[0, 50])),
            (context(None, None, "", &[]), "www", (33, 34, &[34, 50])),
            (context(None, None, "", &[]), "33:log", (33, 50, &[50])),
            (context(None, None, "", &[]), "1000", (1000, 0, &[0])),
            (context(Some(33), None, "", &[7, 7]), "root", (33, 34, &[7, 34, 50])),
            (context(Some(1000), Some(2000), "", &[5]), "", (1000, 2000, &[5, 2000])),
            (context(None, None, "www", &[]), "1", (33, 34, &[34, 50])),
        ];
        for (context, image, expected) in cases {
            let user = resolve(context, image, &files()).expect("resolves");
            assert_eq!(ids(&user), *expected, "{image:?} {context:?}");
        }
    }

    #[test]
    fn the_strict_policy_reads_no_group_file() {
        let mut context = context(Some(33), None, "", &[9]);
        context.supplemental_groups_policy = SupplementalGroupsPolicy::Strict as i32;
        assert_eq!(ids(&resolve(&context, "", &files()).expect("resolves")), (33, 34, &[9, 34][..]));
    }

    #[test]
    fn cve_2024_40635_ids_beyond_31_bits_are_none() {
        let mut files = files();
        files.passwd = Some("evil:x:4294967295:4294967295::/:\nroot:x:0:0::/:\n".into());
        files.group = Some("evil:x:4294967295:root\n".into());
        for image in ["4294967295", "2147483648", "evil", "0:4294967295", "0:evil", "-1", "4294967296"] {
            assert!(resolve(&context(None, None, "", &[]), image, &files).is_err(), "{image}");
        }
        assert!(resolve(&context(Some(1 << 31), None, "", &[]), "", &files).is_err());
        assert!(resolve(&context(Some(1), Some(1 << 31), "", &[]), "", &files).is_err());
        assert!(resolve(&context(Some(1), None, "", &[u32::MAX.into()]), "", &files).is_err());
        assert_eq!(ids(&resolve(&context(Some(i32::MAX.into()), None, "", &[]), "", &files).expect("resolves")).0, i32::MAX as u32);
    }

    #[test]
    fn what_cannot_be_resolved_is_refused() {
        for (context, image) in [
            (context(None, Some(1), "", &[]), ""),
            (context(None, None, "nobody", &[]), ""),
            (context(Some(-1), None, "", &[]), ""),
            (context(None, None, "", &[1 << 40]), ""),
            (context(None, None, "", &[]), "www:nogroup"),
        ] {
            assert!(resolve(&context, image, &files()).is_err(), "{context:?} {image:?}");
        }
        let no_files = UserFiles::default();
        assert_eq!(ids(&resolve(&context(Some(5), None, "", &[]), "", &no_files).expect("resolves")), (5, 0, &[0][..]));
    }
}
