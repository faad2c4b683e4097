//! `Impersonate-*` headers: a request in another's name, by who holds the verb `impersonate` on it
//! (`apiserver/pkg/endpoints/filters/impersonation.go`, v1.37).

use std::sync::Arc;

use apimachinery::status::Status;
use http::HeaderMap;

use crate::api::Api;
use crate::authn::{ANONYMOUS, AUTHENTICATED, UNAUTHENTICATED, User};
use crate::authz::{Attributes, Decision, forbidden};
use crate::request::decode;

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";

/// The user that the request is made as.
///
/// # Errors
/// 403 for what the real user may not impersonate, 400 for groups, UID or extra without a user.
pub fn apply(api: &Api, user: Arc<User>, headers: &HeaderMap) -> Result<Arc<User>, Status> {
    let values =
        |name: &str| -> Vec<String> { headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).map(str::to_owned).collect() };
    let extra: Vec<(String, Vec<String>)> = headers
        .keys()
        .filter_map(|name| Some((name.as_str(), name.as_str().strip_prefix(EXTRA)?)))
        .map(|(name, key)| (decode(key, false).into_owned(), values(name)))
        .collect();
    let (names, groups, uids) = (values(USER), values(GROUP), values(UID));
    let Some(name) = names.first().filter(|name| !name.is_empty()) else {
        if groups.is_empty() && uids.is_empty() && extra.is_empty() {
            return Ok(user);
        }
        return Err(Status::bad_request("requested groups, uid or extra without impersonating a user"));
    };
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, account)) => check(api, &user, "", "serviceaccounts", "", namespace, account)?,
        None => check(api, &user, "", "users", "", "", name)?,
    }
    for group in &groups {
        check(api, &user, "", "groups", "", "", group)?;
    }
    for uid in &uids {
        check(api, &user, "authentication.k8s.io", "uids", "", "", uid)?;
    }
    for (key, values) in &extra {
        for value in values {
            check(api, &user, "authentication.k8s.io", "userextras", key, "", value)?;
        }
    }
    let mut groups = groups;
    if let (Some((namespace, _)), true) = (account, groups.is_empty()) {
        groups = vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
    }
    let own = if name == ANONYMOUS { UNAUTHENTICATED } else { AUTHENTICATED };
    if !groups.iter().any(|group| group == own) {
        groups.push(own.to_owned());
    }
    tracing::debug!(user = %user.name, as_user = %name, "impersonation");
    let uid = uids.into_iter().next().unwrap_or_default();
    Ok(Arc::new(User { name: name.clone(), uid, groups, extra: extra.into_iter().collect() }))
}

fn check(api: &Api, user: &User, api_group: &str, resource: &str, subresource: &str, namespace: &str, name: &str) -> Result<(), Status> {
    let attributes = Attributes {
        user,
        verb: "impersonate",
        api_group,
        resource,
        subresource,
        name,
        namespace,
        path: "",
        is_resource: true,
        node_name_selector: "",
    };
    match api.authorizer.authorize(&attributes) {
        Decision::Allow => Ok(()),
        Decision::NoOpinion(reason) => Err(forbidden(&attributes, &reason)),
    }
}
