//! The fields of a pod, on a live cluster: what a pod with all of them finds inside itself, and what its status says. The rows of
//! `crates/apimachinery/data/fields.toml` name these tests.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::api::{Api, eventually};
use e2e::cluster::Cluster;
use serde_json::{Value, json};

/// The image of all containers.
const IMAGE: &str = "localhost:5000/tools:v1";
const NAMESPACE: &str = "/api/v1/namespaces/default";

/// One cluster for all: the pods are looked at one after another.
#[test]
fn pods_find_what_their_fields_say() -> Result<()> {
    let cluster = Cluster::start("fields")?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    let api = cluster.api();
    prepare(&cluster, &api)?;
    let mut failures = Vec::new();
    let mut judge = |name: &str, result: Result<()>| {
        println!("--- {name}: {}", if result.is_ok() { "ok" } else { "FAILED" });
        failures.extend(result.err().map(|error| format!("{name}: {error:?}")));
    };
    judge("inside", inside(&cluster, &api));
    judge("host", of_the_host(&cluster, &api));
    judge("ends", ends(&api));
    judge("hooks", hooks(&cluster, &api));
    judge("probes", probes(&api));
    judge("gates", gates(&api));
    judge("ports", ports(&cluster, &api));
    ensure!(failures.is_empty(), "{}\n--- coracle up\n{}", failures.join("\n"), cluster.log_tail());
    Ok(())
}

/// What the pods refer to.
fn prepare(cluster: &Cluster, api: &Api) -> Result<()> {
    fs::create_dir_all(cluster.folder().join("host/made")).context("failed to create a folder")?;
    fs::write(cluster.folder().join("host/made/file"), "on the host").context("failed to write a file")?;
    fs::write(cluster.folder().join("host/file"), "a file").context("failed to write a file")?;
    // Mounts of the host reach a container only below a shared mount, which nothing in the cluster's namespace is.
    let made = cluster.folder().join("host/made");
    let made = made.to_string_lossy();
    for arguments in [["--bind", &made, &made].as_slice(), &["--make-rshared", &made]] {
        let output = cluster.run("mount".as_ref(), arguments, "")?;
        ensure!(output.status.success(), "mount {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    for (resource, object) in [
        (
            "configmaps",
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "words"}, "data": {"word": "hello", "other": "x"}}),
        ),
        ("secrets", json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "secrets"}, "stringData": {"key": "hidden"}})),
        ("serviceaccounts", json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "robot"}})),
        (
            "services",
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "my-service"}, "spec": {"ports": [{"name": "web", "port": 81}]}}),
        ),
    ] {
        let path = format!("{NAMESPACE}/{resource}");
        let (status, body) = api.ask("POST", &path, "application/json", &object.to_string())?;
        ensure!(status == 201, "POST {path}: {status}: {body}");
    }
    Ok(())
}

/// The `key=value` lines that a container has printed, once it has printed all.
fn printed(api: &Api, pod: &str, container: &str) -> Result<BTreeMap<String, String>> {
    let mut lines = BTreeMap::new();
    let mut log = String::new();
    let waited = eventually(&format!("{pod}/{container} has printed all"), || {
        let (status, body) = api.ask("GET", &format!("{NAMESPACE}/pods/{pod}/log?container={container}"), "", "")?;
        log = body;
        lines = log.lines().filter_map(|line| line.trim_end().split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        Ok(status == 200 && lines.contains_key("end"))
    });
    waited.with_context(|| {
        format!("its log: {log}\nits status: {}\n{}", api.pod(pod).unwrap_or_default()["status"], api.events(pod).unwrap_or_default())
    })?;
    Ok(lines)
}

/// Compares lines of a container with what is expected; every difference is told.
fn compare(container: &str, lines: &BTreeMap<String, String>, expected: &[(&str, &str)]) -> Vec<String> {
    let differs = |(key, value): &&(&str, &str)| lines.get(*key).map(String::as_str) != Some(*value);
    expected.iter().filter(differs).map(|(key, value)| format!("{container}: {key} is {:?}, not {value:?}", lines.get(*key))).collect()
}

fn inside(cluster: &Cluster, api: &Api) -> Result<()> {
    let text = include_str!("../data/fields.yaml").replace("HOST_FOLDER", &cluster.folder().join("host").to_string_lossy());
    let pod: Value = serde_yaml_ng::from_str(&text).context("fields.yaml")?;
    api.create_pod(&pod)?;
    let pod = api.wait_ready("inside").with_context(|| api.events("inside").unwrap_or_default())?;
    let text = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (uid, pod_ip, host_ip) = (text("/metadata/uid"), text("/status/podIP"), text("/status/hostIP"));
    let node = text("/spec/nodeName");
    let mut wrong = Vec::new();

    let lines = printed(api, "inside", "env")?;
    wrong.extend(compare(
        "env",
        &lines,
        &[
            ("argument", "plain"),
            ("directory", "/tmp"),
            ("PLAIN", "plain"),
            ("EXPANDED", "<plain>"),
            ("CM_word", "hello"),
            ("CM_other", "x"),
            ("SEC_key", "hidden"),
            ("ONE_WORD", "hello"),
            ("ONE_SECRET", "hidden"),
            ("POD_NAME", "inside"),
            ("POD_NAMESPACE", "default"),
            ("POD_UID", &uid),
            ("POD_LABEL", "inside"),
            ("POD_NOTE", "two words"),
            ("POD_IP", &pod_ip),
            ("HOST_IP", &host_ip),
            ("NODE_NAME", &node),
            ("ACCOUNT", "robot"),
            ("CPU_LIMIT", "250"),
            ("MEMORY_REQUEST", "16777216"),
            ("MY_SERVICE_SERVICE_PORT_WEB", "81"),
            ("quota", "25000"),
            ("memory", "67108864"),
        ],
    ));
    if lines.contains_key("NO_WORD") || lines.contains_key("NO_SECRET") {
        wrong.push("env: an optional key that is missing became a variable".to_owned());
    }
    // 100m are 102 shares, which is the weight 4.
    if lines.get("shares").map(String::as_str) != Some("102") && lines.get("weight").map(String::as_str) != Some("4") {
        wrong.push(format!("env: shares {:?}, weight {:?}", lines.get("shares"), lines.get("weight")));
    }
    let expected = [
        ("user", "1001"),
        ("group", "2001"),
        ("bounding", "0000000000000001"),
        ("new_privileges", "1"),
        ("seccomp", "0"),
        ("root", "read-only"),
    ];
    wrong.extend(compare("security", &printed(api, "inside", "security")?, &expected));
    wrong.extend(compare("pod", &printed(api, "inside", "pod")?, &POD));
    let lines = printed(api, "inside", "privileged")?;
    wrong.extend(compare("privileged", &lines, &[("seccomp", "0"), ("terminal", "yes"), ("devices", "all")]));
    let effective = lines.get("effective").and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(0);
    if effective & (1 << 21) == 0 {
        wrong.push(format!("privileged: no CAP_SYS_ADMIN in {effective:x}"));
    }
    wrong.extend(volumes(api)?);
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    api.delete_pod("inside")
}

/// What the container says that looks at its volumes, and what its token says.
fn volumes(api: &Api) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let lines = printed(api, "inside", "volumes")?;
    wrong.extend(compare("volumes", &lines, &VOLUMES));
    let claims = lines.get("token").cloned().unwrap_or_default();
    let claims = decode(&claims)?;
    if claims["aud"] != json!(["somebody"]) || claims["sub"] != "system:serviceaccount:default:robot" {
        wrong.push(format!("volumes: the token says {claims}"));
    }
    let life = claims["exp"].as_i64().unwrap_or(0) - claims["iat"].as_i64().unwrap_or(0);
    if life != 1200 {
        wrong.push(format!("volumes: the token lives for {life} s"));
    }
    Ok(wrong)
}

/// What the container finds that has no security context of its own.
const POD: [(&str, &str); 14] = [
    ("user", "1000"),
    ("group", "2000"),
    ("groups", "2000 3000 4000"),
    ("new_privileges", "0"),
    ("seccomp", "2"),
    ("hostname", "host.sub.default.svc.cluster.local"),
    ("shm", "1"),
    ("nameserver", "192.0.2.53"),
    ("search", "a.example b.example"),
    ("options", "ndots:3 edns0"),
    ("alias", "192.0.2.9 alias.one alias.two"),
    ("own", "host.sub.default.svc.cluster.local host"),
    ("init", "from-init"),
    ("neighbours", "seen"),
];

/// What the container finds in its volumes. With fsGroup, files get the group's read bit.
const VOLUMES: [(&str, &str); 22] = [
    ("words", "440 hello"),
    ("picked", "444 hello"),
    ("picked_all", "one"),
    ("secret", "444 hidden"),
    ("secret_item", "464 hidden"),
    ("optional", "3"),
    ("label", "444 inside"),
    ("limit", "464 64"),
    ("projected_words", "444 hello"),
    ("projected_secret", "464 hidden"),
    ("projected_down", "444 inside"),
    ("token_mode", "640"),
    ("account", "3"),
    ("shared_group", "4000"),
    ("memory", "tmpfs 1024k"),
    ("host", "on the host"),
    ("host_file", "a file"),
    ("sub", "in-sub"),
    ("expr", "in-expr"),
    ("host_mount", "read-only"),
    ("propagation", "slave"),
    ("no_propagation", "private"),
];

/// The claims of a token.
fn decode(part: &str) -> Result<Value> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'-' => Some(62),
        b'_' => Some(63),
        _ => None,
    };
    let (mut bits, mut count, mut bytes) = (0u32, 0, Vec::new());
    for byte in part.bytes().filter_map(digit) {
        bits = bits << 6 | u32::from(byte);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff)?);
        }
    }
    serde_json::from_slice(&bytes).with_context(|| format!("the token's claims are {part:?}"))
}

/// A pod in the node's namespaces.
fn of_the_host(cluster: &Cluster, api: &Api) -> Result<()> {
    let script = "for n in net ipc pid; do echo $n=$(busybox readlink /proc/self/ns/$n); done; echo search=$(grep -c . /etc/resolv.conf); \
                  echo hosts=$(head -n 1 /etc/hosts); env | grep SERVICE_HOST; echo end=host; exec sleep 1000000";
    api.create_pod(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "host"}, "spec": {
        "hostNetwork": true, "hostPID": true, "hostIPC": true, "dnsPolicy": "Default", "terminationGracePeriodSeconds": 1,
        "enableServiceLinks": false, "automountServiceAccountToken": false, "priorityClassName": "system-node-critical",
        "containers": [{"name": "c", "image": IMAGE, "command": ["sh", "-c", script],
            "securityContext": {"procMount": "Default"}}]}}))?;
    let lines = printed(api, "host", "c")?;
    let pid = cluster.pid().context("coracle up is not running")?;
    let own = |name: &str| -> Result<String> {
        let link = fs::read_link(format!("/proc/{pid}/ns/{name}")).with_context(|| format!("failed to read namespace {name} of {pid}"))?;
        Ok(link.to_string_lossy().into_owned())
    };
    let (net, ipc, pid) = (own("net")?, own("ipc")?, own("pid")?);
    let mut wrong = compare("host", &lines, &[("net", &net), ("ipc", &ipc), ("pid", &pid)]);
    wrong.extend(compare("host", &lines, &[("hosts", "# Kubernetes-managed hosts file (host network).")]));
    if lines.contains_key("MY_SERVICE_SERVICE_HOST") || !lines.contains_key("KUBERNETES_SERVICE_HOST") {
        wrong.push(format!("host: without service links there is only the API's own: {lines:?}"));
    }
    let pod = api.pod("host")?;
    let mounts = pod.pointer("/spec/containers/0/volumeMounts");
    if mounts.is_some() {
        wrong.push(format!("host: a token was mounted: {mounts:?}"));
    }
    if pod["spec"]["priority"] != 2_000_001_000 || pod["status"]["podIP"] != pod["status"]["hostIP"] {
        wrong.push(format!("host: {}", pod["status"]));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    api.delete_pod("host")
}

/// Pods that end: policies, messages, deadlines.
fn ends(api: &Api) -> Result<()> {
    let run = |name: &str, script: &str, more: Value| {
        let mut container = json!({"name": name, "image": IMAGE, "command": ["sh", "-c", script]});
        for (key, value) in more.as_object().cloned().unwrap_or_default() {
            container[key] = value;
        }
        container
    };
    api.create_pod(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ends"}, "spec": {"restartPolicy": "Never", "containers": [
        run("file", "echo why > /tmp/why; exit 3", json!({"terminationMessagePath": "/tmp/why"})),
        run("log", "echo last words; exit 4", json!({"terminationMessagePolicy": "FallbackToLogsOnError"})),
        run("well", "echo not told", json!({"terminationMessagePolicy": "FallbackToLogsOnError"})),
        run("again", "test -e /shared/x && exit 0; touch /shared/x; exit 42", json!({"volumeMounts": [{"name": "v", "mountPath": "/shared"}],
            "restartPolicy": "Never", "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]})),
    ], "volumes": [{"name": "v", "emptyDir": {}}]}}))?;
    api.create_pod(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "late"}, "spec": {"activeDeadlineSeconds": 1,
        "terminationGracePeriodSeconds": 1, "containers": [run("c", "exec sleep 1000000", json!({}))]}}))?;
    api.create_pod(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "again"}, "spec": {"restartPolicy": "OnFailure",
        "containers": [run("c", "test -e /shared/x && exit 0; touch /shared/x; exit 1", json!({"volumeMounts": [{"name": "v", "mountPath": "/shared"}]}))],
        "volumes": [{"name": "v", "emptyDir": {}}]}}))?;
    let phase = |name: &str, wanted: &str| {
        eventually(&format!("{name} is {wanted}"), || Ok(api.pod(name)?["status"]["phase"] == wanted))
            .with_context(|| format!("{}", api.pod(name).unwrap_or_default()["status"]))
    };
    phase("ends", "Failed")?;
    phase("late", "Failed")?;
    phase("again", "Succeeded")?;
    let pod = api.pod("ends")?;
    let list = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
    let of = |name: &str| list.iter().find(|status| status["name"] == name).cloned().unwrap_or_default();
    let told = |name: &str| (of(name)["state"]["terminated"]["exitCode"].clone(), of(name)["state"]["terminated"]["message"].clone());
    ensure!(told("file") == (json!(3), json!("why\n")), "file: {}", of("file"));
    ensure!(told("log") == (json!(4), json!("last words\n")), "log: {}", of("log"));
    ensure!(told("well") == (json!(0), Value::Null), "well: {}", of("well"));
    ensure!(of("again")["restartCount"] == 1 && told("again").0 == json!(0), "again: {}", of("again"));
    let late = api.pod("late")?;
    ensure!(late["status"]["reason"] == "DeadlineExceeded", "late: {}", late["status"]);
    ensure!(api.pod("again")?["status"]["containerStatuses"][0]["restartCount"] == 1, "again: {}", api.pod("again")?["status"]);
    ["ends", "late", "again"].iter().try_for_each(|name| api.delete_pod(name))
}

/// Hooks at the start and at the end: what they write is found on the host.
fn hooks(cluster: &Cluster, api: &Api) -> Result<()> {
    let folder = cluster.folder().join("hooks");
    let script =
        "#!/bin/sh\necho \"$REQUEST_URI $HTTP_X_HOOK $HTTP_HOST\" > /hooks/http\nprintf 'Content-Type: text/plain\\r\\n\\r\\nok\\n'\n";
    let web = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "web"}, "data": {"hook": script}});
    let (status, body) = api.ask("POST", &format!("{NAMESPACE}/configmaps"), "application/json", &web.to_string())?;
    ensure!(status == 201, "{status}: {body}");
    let container = |name: &str, command: &str, lifecycle: Value| {
        json!({"name": name, "image": IMAGE, "command": ["sh", "-c", command], "lifecycle": lifecycle,
            "volumeMounts": [{"name": "hooks", "mountPath": "/hooks"}, {"name": "web", "mountPath": "/www/cgi-bin"}],
            "ports": [{"name": "http", "containerPort": 8080}]})
    };
    let exec = |text: &str| json!({"exec": {"command": ["sh", "-c", format!("echo done > /hooks/{text}")]}});
    api.create_pod(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "hooks"}, "spec": {"terminationGracePeriodSeconds": 20,
        "containers": [
            container("exec", "trap 'exit 0' TERM; while :; do sleep 1; done", json!({"postStart": exec("start"), "preStop": exec("stop")})),
            container("http", "exec httpd -f -h /www -p 8080", json!({"preStop": {"httpGet": {"port": "http", "path": "/cgi-bin/hook?x=1",
                "httpHeaders": [{"name": "X-Hook", "value": "stop"}, {"name": "Host", "value": "hook.example"}]}}})),
            container("sleep", "trap 'echo done > /hooks/slept; exit 0' TERM; while :; do sleep 1; done",
                json!({"preStop": {"sleep": {"seconds": 1}}})),
        ],
        "volumes": [{"name": "hooks", "hostPath": {"path": folder, "type": "DirectoryOrCreate"}},
            {"name": "web", "configMap": {"name": "web", "defaultMode": 0o755}}]}}))?;
    api.wait_ready("hooks").with_context(|| api.events("hooks").unwrap_or_default())?;
    ensure!(folder.join("start").exists(), "no postStart hook ran");
    let path = format!("{NAMESPACE}/pods/hooks");
    let (status, body) = api.ask("DELETE", &path, "", "")?;
    ensure!(status == 200 || status == 202, "DELETE {path}: {status}: {body}");
    eventually("pod hooks is gone", || Ok(api.ask("GET", &path, "", "")?.0 == 404))?;
    for name in ["stop", "slept"] {
        ensure!(folder.join(name).exists(), "{name} was not written:\n{}", api.events("hooks").unwrap_or_default());
    }
    let http = fs::read_to_string(folder.join("http")).with_context(|| api.events("hooks").unwrap_or_default())?;
    ensure!(http.trim() == "/cgi-bin/hook?x=1 stop hook.example", "the HTTP hook asked {http:?}");
    Ok(())
}

/// Probes of each kind: who passes is ready, who does not is not, or is restarted.
fn probes(api: &Api) -> Result<()> {
    let web = "mkdir -p /www; echo ok > /www/ok; exec httpd -f -h /www -p 8080";
    let container = |name: &str, command: &str, more: Value| {
        let mut container = json!({"name": name, "image": IMAGE, "command": ["sh", "-c", command]});
        for (key, value) in more.as_object().cloned().unwrap_or_default() {
            container[key] = value;
        }
        container
    };
    let every = |probe: Value| {
        let mut probe = probe;
        probe["periodSeconds"] = json!(1);
        probe
    };
    let get = |path: &str| every(json!({"httpGet": {"port": "web", "path": path, "scheme": "HTTP"}}));
    let sleep = "exec sleep 1000000";
    api.create_pod(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probes"}, "spec": {"terminationGracePeriodSeconds": 1,
        "containers": [
            container("http", web, json!({"ports": [{"name": "web", "containerPort": 8080}], "readinessProbe": get("/ok"),
                "livenessProbe": every(json!({"tcpSocket": {"port": 8080}})), "startupProbe": get("/ok")})),
            container("absent", sleep, json!({"ports": [{"name": "web", "containerPort": 8080}], "readinessProbe": get("/absent")})),
            container("exec", "sleep 2; touch /tmp/ready; exec sleep 1000000",
                json!({"readinessProbe": every(json!({"exec": {"command": ["sh", "-c", "test -e /tmp/ready"]}, "successThreshold": 2}))})),
            container("closed", sleep, json!({"readinessProbe": every(json!({"tcpSocket": {"port": 9999}}))})),
            container("slow", sleep, json!({"readinessProbe": every(json!({"exec": {"command": ["sleep", "60"]}, "timeoutSeconds": 1, "failureThreshold": 1}))})),
            container("dying", sleep, json!({"livenessProbe": every(json!({"exec": {"command": ["false"]}, "failureThreshold": 1,
                "terminationGracePeriodSeconds": 1}))})),
            container("never-started", sleep, json!({"startupProbe": every(json!({"exec": {"command": ["false"]}, "failureThreshold": 1}))})),
            container("delayed", sleep, json!({"readinessProbe": every(json!({"exec": {"command": ["true"]}, "initialDelaySeconds": 3600}))})),
        ]}}))?;
    let mut last = Value::Null;
    let seen = eventually("the probes have had their say", || {
        last = api.pod("probes")?["status"]["containerStatuses"].clone();
        let list = last.as_array().cloned().unwrap_or_default();
        let of = |name: &str| list.iter().find(|status| status["name"] == name).cloned().unwrap_or_default();
        let restarted = |name: &str| of(name)["restartCount"].as_i64().unwrap_or(0) > 0;
        Ok(of("http")["ready"] == true && of("exec")["ready"] == true && restarted("dying") && restarted("never-started"))
    });
    seen.with_context(|| format!("{last}\n{}", api.events("probes").unwrap_or_default()))?;
    for status in last.as_array().into_iter().flatten() {
        let ready = ["http", "exec", "dying"].iter().any(|name| status["name"] == *name);
        ensure!(ready || status["ready"] == false, "{status}");
    }
    let mut told = String::new();
    eventually("failed probes are told", || {
        told = api.events("probes")?;
        let words = [
            "Readiness probe failed: HTTP probe failed with statuscode: 404",
            "connect: connection refused",
            "Liveness probe failed",
            "timed out",
        ];
        Ok(words.iter().all(|word| told.contains(word)) && told.contains("Startup probe failed"))
    })
    .with_context(|| told.clone())?;
    api.delete_pod("probes")
}

/// A pod is Ready only when whoever its gates name says so.
fn gates(api: &Api) -> Result<()> {
    api.create_pod(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "gates"}, "spec": {"terminationGracePeriodSeconds": 1,
        "readinessGates": [{"conditionType": "example.com/gate"}],
        "containers": [{"name": "c", "image": IMAGE, "command": ["sleep", "1000000"]}]}}))?;
    let condition = |wanted: &str| -> Result<Value> {
        let pod = api.pod("gates")?;
        let list = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(list.into_iter().find(|condition| condition["type"] == wanted).unwrap_or_default())
    };
    eventually("the containers are ready", || Ok(condition("ContainersReady")?["status"] == "True"))?;
    ensure!(condition("Ready")?["reason"] == "ReadinessGatesNotReady", "{}", condition("Ready")?);
    let patch = json!({"status": {"conditions": [{"type": "example.com/gate", "status": "True"}]}}).to_string();
    let (status, body) = api.ask("PATCH", &format!("{NAMESPACE}/pods/gates/status"), "application/strategic-merge-patch+json", &patch)?;
    ensure!(status == 200, "{status}: {body}");
    api.wait_ready("gates")?;
    api.delete_pod("gates")
}

/// Host ports lead to the pod, by their address and protocol.
fn ports(cluster: &Cluster, api: &Api) -> Result<()> {
    api.create_pod(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ports"}, "spec": {"terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": IMAGE, "command": ["sh", "-c", "mkdir -p /www; echo by-port > /www/x; exec httpd -f -h /www -p 8080"],
            "ports": [{"name": "a", "containerPort": 8080, "hostPort": 18080, "hostIP": "127.0.0.1", "protocol": "TCP"}]}]}}))?;
    let pod = api.wait_ready("ports")?;
    let curl = |url: &str| {
        let output = cluster.run("/usr/bin/curl".as_ref(), &["--silent", "--max-time", "5", url], "")?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    eventually("the host's port answers", || Ok(curl("http://127.0.0.1:18080/x")? == "by-port"))?;
    let host_ip = pod["status"]["hostIP"].as_str().context("no host IP")?;
    ensure!(curl(&format!("http://{host_ip}:18080/x"))?.is_empty(), "the port is open on another address than its own");
    api.delete_pod("ports")
}
