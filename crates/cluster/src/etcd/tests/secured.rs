//! An etcd that asks who calls, by certificate or by password.

use std::{ffi::OsString, fs, path::PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::time;

use super::{
    super::{
        endpoints::Endpoints,
        prefix,
        stubs::{
            AuthEnableRequest, AuthRoleAddRequest, AuthRoleGrantPermissionRequest,
            AuthUserAddRequest, AuthUserChangePasswordRequest, AuthUserGrantRoleRequest,
            auth_client::AuthClient, authpb,
        },
    },
    TTL,
    server::{self, EtcdServer, Place, scratch},
};
use crate::{
    ClusterError, EtcdCredentials, EtcdOptions, EtcdPassword, EtcdRegistry, EtcdTls, Registry,
    WorkerRecord, WorkerState,
    suite::{names, record, soon, view_where},
};

/// An authority and the files of those it vouches for; gone when dropped.
struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let directory = scratch("authority");
        fs::create_dir_all(&directory).unwrap();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, "Tercet tests");
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        fs::write(directory.join("ca.pem"), certificate.pem()).unwrap();
        Self { directory, issuer: Issuer::new(parameters, key) }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Writes a certificate of that common name and those hosts, and its key; returns where.
    fn vouch(&self, name: &str, hosts: &[&str]) -> (PathBuf, PathBuf) {
        let hosts: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        let mut parameters = CertificateParams::new(hosts).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let paths = (self.file(&format!("{name}.pem")), self.file(&format!("{name}.key")));
        fs::write(&paths.0, certificate.pem()).unwrap();
        fs::write(&paths.1, key.serialize_pem()).unwrap();
        paths
    }

    /// Returns how a client of this authority connects, showing that certificate.
    fn tls(&self, identity: Option<(PathBuf, PathBuf)>) -> EtcdTls {
        EtcdTls { authorities: Some(self.file("ca.pem")), identity, server_name: None }
    }

    /// Starts an etcd at which only those show up whom this authority vouches for.
    fn etcd(&self, binary: &std::path::Path, hosts: &[&str]) -> EtcdServer {
        let (certificate, key) = self.vouch("etcd", hosts);
        let mut place = Place { scheme: "https", ..Place::alone(binary) };
        let mut argue = |flag: &str, value: OsString| {
            place.arguments.extend([OsString::from(flag), value]);
        };
        argue("--cert-file", certificate.into());
        argue("--key-file", key.into());
        argue("--trusted-ca-file", self.file("ca.pem").into());
        place.arguments.push("--client-cert-auth".into());
        EtcdServer::start_at(place)
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).ok();
    }
}

fn options(etcd: &EtcdServer) -> EtcdOptions {
    let options = EtcdOptions::new(vec![etcd.address()], "test".parse().unwrap());
    EtcdOptions { lease_ttl: TTL, ..options }
}

fn user(user: &str, password: &str) -> Option<EtcdCredentials> {
    let password = EtcdPassword::Given(password.to_owned());
    Some(EtcdCredentials { user: user.to_owned(), password })
}

/// Makes an administrator, and a user with a role that may use the keys of the test's cluster;
/// then everybody is asked who they are.
async fn enable(endpoints: &Endpoints, member: &str) {
    macro_rules! ask {
        ($method:ident($request:expr)) => {{
            let request = $request;
            let answer = endpoints.call(|connection| {
                let request = request.clone();
                async move { AuthClient::new(connection).$method(request).await }
            });
            answer.await.unwrap()
        }};
    }
    for (name, role) in [("root", "root"), (member, "member")] {
        let password = format!("{name}'s password");
        ask!(user_add(AuthUserAddRequest { name: name.to_owned(), password }));
        ask!(role_add(AuthRoleAddRequest { name: role.to_owned() }));
        let grant = AuthUserGrantRoleRequest { user: name.to_owned(), role: role.to_owned() };
        ask!(user_grant_role(grant));
    }
    let key = prefix(&"test".parse().unwrap()).into_bytes();
    let mut range_end = key.clone();
    *range_end.last_mut().unwrap() += 1;
    let perm_type = authpb::permission::Type::Readwrite.into();
    let perm = Some(authpb::Permission { perm_type, key, range_end });
    let name = "member".to_owned();
    ask!(role_grant_permission(AuthRoleGrantPermissionRequest { name, perm }));
    ask!(auth_enable(AuthEnableRequest {}));
}

/// Registers, changes and withdraws a worker.
async fn takes_part(registry: &EtcdRegistry) {
    let mut views = registry.watch();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| view.current && names(view) == ["a"]).await;
    let ready = |record: &mut WorkerRecord| record.state = WorkerState::Ready;
    soon("update", registration.update(ready)).await.unwrap();
    soon("leave", registration.leave()).await;
    view_where(&mut views, "the leave", |view| view.workers.is_empty()).await;
}

#[tokio::test]
async fn members_and_callers_prove_who_they_are() {
    let Some(binary) = server::find() else { return };
    let authority = Authority::new();
    let etcd = authority.etcd(&binary, &["127.0.0.1"]);
    let shown = authority.vouch("worker", &[]);
    let options = options(&etcd);
    let connect = |tls| EtcdRegistry::connect(EtcdOptions { tls, ..options.clone() }).unwrap();
    takes_part(&connect(authority.tls(Some(shown.clone())))).await;

    let stranger = Authority::new();
    for (what, tls) in [
        ("nothing shown", authority.tls(None)),
        ("a stranger's certificate", authority.tls(Some(stranger.vouch("worker", &[])))),
        ("another authority trusted", stranger.tls(Some(shown.clone()))),
        ("public authorities trusted", EtcdTls { identity: Some(shown), ..EtcdTls::default() }),
    ] {
        let registry = connect(tls);
        let registered = time::timeout(TTL * 2, registry.register(record("a", 1))).await;
        assert!(registered.is_err(), "{what}: {registered:?}");
        assert!(!registry.watch().borrow().current, "{what}");
    }
}

#[tokio::test]
async fn a_members_certificate_may_bear_another_name() {
    let Some(binary) = server::find() else { return };
    let authority = Authority::new();
    let etcd = authority.etcd(&binary, &["etcd.internal"]);
    let options = options(&etcd);
    let tls = authority.tls(Some(authority.vouch("worker", &[])));
    let unnamed = EtcdOptions { tls: tls.clone(), ..options.clone() };
    let unnamed = EtcdRegistry::connect(unnamed).unwrap();
    let registered = time::timeout(TTL * 2, unnamed.register(record("a", 1))).await;
    assert!(registered.is_err(), "taken for 127.0.0.1: {registered:?}");
    let tls = EtcdTls { server_name: Some("etcd.internal".to_owned()), ..tls };
    takes_part(&EtcdRegistry::connect(EtcdOptions { tls, ..options }).unwrap()).await;
}

#[tokio::test]
async fn renewed_certificates_take_effect() {
    let Some(binary) = server::find() else { return };
    let authority = Authority::new();
    let etcd = authority.etcd(&binary, &["127.0.0.1"]);
    let stranger = Authority::new();
    let (certificate, key) = stranger.vouch("worker", &[]);
    let tls = authority.tls(Some((certificate.clone(), key.clone())));
    let registry = EtcdRegistry::connect(EtcdOptions { tls, ..options(&etcd) }).unwrap();
    let waiting = registry.register(record("a", 1));
    tokio::pin!(waiting);
    let refused = time::timeout(TTL * 2, &mut waiting).await;
    assert!(refused.is_err(), "a stranger got in: {refused:?}");
    let renewed = authority.vouch("worker", &[]);
    // Half of it first: what does not fit together is not used, and does no harm.
    fs::copy(renewed.0, certificate).unwrap();
    fs::copy(renewed.1, key).unwrap();
    let registration = soon("register", waiting).await.unwrap();
    soon("leave", registration.leave()).await;
}

#[tokio::test]
async fn a_certificate_can_name_the_user() {
    let Some(binary) = server::find() else { return };
    let authority = Authority::new();
    let etcd = authority.etcd(&binary, &["127.0.0.1"]);
    let tls = authority.tls(Some(authority.vouch("worker", &[])));
    let options = EtcdOptions { tls, ..options(&etcd) };
    enable(&server::endpoints(&options), "worker").await;
    takes_part(&EtcdRegistry::connect(options.clone()).unwrap()).await;

    let tls = authority.tls(Some(authority.vouch("nobody", &[])));
    let registry = EtcdRegistry::connect(EtcdOptions { tls, ..options }).unwrap();
    let refused = soon("the refusal", registry.register(record("a", 1))).await;
    assert!(matches!(&refused, Err(ClusterError::Refused { .. })), "{refused:?}");
}

#[tokio::test]
async fn files_are_read_before_anything_starts() {
    let authority = Authority::new();
    let (certificate, key) = authority.vouch("worker", &[]);
    let empty = authority.file("empty");
    fs::write(&empty, "").unwrap();
    let connect = |tls, credentials| {
        let options = EtcdOptions::new(vec!["a:1".to_owned()], "test".parse().unwrap());
        EtcdRegistry::connect(EtcdOptions { tls, credentials, ..options }).map(drop)
    };
    let identity = |certificate: &PathBuf, key: &PathBuf| EtcdTls {
        identity: Some((certificate.clone(), key.clone())),
        ..EtcdTls::default()
    };
    let authorities =
        |path: &PathBuf| EtcdTls { authorities: Some(path.clone()), ..EtcdTls::default() };
    connect(identity(&certificate, &key), None).unwrap();
    let absent = authority.file("absent");
    for tls in [authorities(&absent), identity(&absent, &key), identity(&certificate, &absent)] {
        let error = connect(tls, None).unwrap_err();
        assert!(matches!(&error, ClusterError::File { path, .. } if *path == absent), "{error}");
    }
    let other = authority.vouch("other", &[]).1;
    for tls in [
        authorities(&empty),
        identity(&empty, &key),
        identity(&certificate, &empty),
        identity(&certificate, &other),
    ] {
        let error = connect(tls.clone(), None).unwrap_err();
        assert!(matches!(error, ClusterError::Tls(_)), "{tls:?}: {error}");
    }
    let password = EtcdPassword::File(absent);
    let credentials = EtcdCredentials { user: "a".to_owned(), password };
    let error = connect(EtcdTls::default(), Some(credentials)).unwrap_err();
    assert!(matches!(error, ClusterError::File { .. }), "{error}");
}

/// Starts an etcd that asks for passwords, with those flags.
async fn asking(flags: &[&str]) -> Option<EtcdServer> {
    let mut place = Place::alone(&server::find()?);
    place.arguments.extend(flags.iter().map(OsString::from));
    let etcd = EtcdServer::start_at(place);
    enable(&etcd.endpoints(), "tercet").await;
    Some(etcd)
}

#[tokio::test]
async fn a_wrong_password_is_one_clear_error() {
    let Some(etcd) = asking(&["--bcrypt-cost", "4"]).await else { return };
    let connect =
        |credentials| EtcdRegistry::connect(EtcdOptions { credentials, ..options(&etcd) }).unwrap();
    takes_part(&connect(user("tercet", "tercet's password"))).await;
    for (credentials, who) in [
        (user("tercet", "open sesame"), "user `tercet`"),
        (user("nobody", "tercet's password"), "user `nobody`"),
        (None, "no user"),
    ] {
        let registry = connect(credentials);
        let refused = soon("the refusal", registry.register(record("a", 1))).await.unwrap_err();
        let said = refused.to_string();
        assert!(matches!(refused, ClusterError::Refused { .. }), "{said}");
        assert!(said.contains(who) && !said.contains("sesame"), "{said}");
        // Whoever only watches is told, too.
        let refused = soon("the refusal", connect(None).refused()).await;
        assert!(matches!(refused, ClusterError::Refused { .. }), "{refused}");
    }
}

#[tokio::test]
async fn an_unknown_place_is_refused_to_a_user() {
    let Some(etcd) = asking(&["--bcrypt-cost", "4"]).await else { return };
    let credentials = user("tercet", "tercet's password");
    let cluster = "another".parse().unwrap();
    let options = EtcdOptions { credentials, cluster, ..options(&etcd) };
    let registry = EtcdRegistry::connect(options).unwrap();
    let refused = soon("the refusal", registry.register(record("a", 1))).await.unwrap_err();
    assert!(refused.to_string().contains("permission denied"), "{refused}");
}

#[tokio::test]
async fn expired_tokens_are_replaced() {
    let flags = ["--bcrypt-cost", "4", "--auth-token-ttl", "1"];
    let Some(mut etcd) = asking(&flags).await else { return };
    let credentials = user("tercet", "tercet's password");
    // Renewals come more rarely than tokens expire.
    let lease_ttl = TTL * 6;
    let options = EtcdOptions { credentials, lease_ttl, ..options(&etcd) };
    let registry = EtcdRegistry::connect(options).unwrap();
    let mut views = registry.watch();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    view_where(&mut views, "the worker", |view| view.current && names(view) == ["a"]).await;
    // The clock is what is tested here.
    time::sleep(TTL * 4).await;
    let ready = |record: &mut WorkerRecord| record.state = WorkerState::Ready;
    soon("update", registration.update(ready)).await.unwrap();

    // A member started anew knows no token.
    etcd.kill();
    view_where(&mut views, "the outage", |view| !view.current).await;
    etcd.restart();
    etcd.ready();
    view_where(&mut views, "the return", |view| view.current && names(view) == ["a"]).await;
    let draining = |record: &mut WorkerRecord| record.state = WorkerState::Draining;
    soon("update", registration.update(draining)).await.unwrap();
    soon("leave", registration.leave()).await;
}

#[tokio::test]
async fn a_changed_password_locks_nobody_out_who_learns_it() {
    let flags = ["--bcrypt-cost", "4", "--auth-token-ttl", "1"];
    let Some(etcd) = asking(&flags).await else { return };
    let path = scratch("password");
    fs::write(&path, "tercet's password\n").unwrap();
    let password = EtcdPassword::File(path.clone());
    let credentials = Some(EtcdCredentials { user: "tercet".to_owned(), password });
    let registry = EtcdRegistry::connect(EtcdOptions { credentials, ..options(&etcd) }).unwrap();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();

    let root = EtcdOptions { credentials: user("root", "root's password"), ..options(&etcd) };
    let change = AuthUserChangePasswordRequest {
        name: "tercet".to_owned(),
        password: "another password".to_owned(),
    };
    let endpoints = server::endpoints(&root);
    let changed = endpoints.call(|connection| {
        let change = change.clone();
        async move { AuthClient::new(connection).user_change_password(change).await }
    });
    changed.await.unwrap();
    time::sleep(TTL * 2).await;
    let ready = |record: &mut WorkerRecord| record.state = WorkerState::Ready;
    let waiting = time::timeout(TTL, registration.update(ready)).await;
    assert!(waiting.is_err(), "nothing was locked: {waiting:?}");
    let told = time::timeout(TTL, registry.refused()).await;
    assert!(told.is_err(), "who was in before is not thrown out: {told:?}");
    fs::write(&path, "another password\n").unwrap();
    let draining = |record: &mut WorkerRecord| record.state = WorkerState::Draining;
    soon("update", registration.update(draining)).await.unwrap();
    soon("leave", registration.leave()).await;
    fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn signed_tokens_serve_as_well() {
    let key = scratch("jwt.key");
    let pair = KeyPair::generate().unwrap();
    fs::write(&key, pair.serialize_pem()).unwrap();
    let token = format!("jwt,priv-key={},sign-method=ES256,ttl=1s", key.display());
    let Some(mut etcd) = asking(&["--bcrypt-cost", "4", "--auth-token", &token]).await else {
        return;
    };
    let credentials = user("tercet", "tercet's password");
    let options = EtcdOptions { credentials, ..options(&etcd) };
    let registry = EtcdRegistry::connect(options).unwrap();
    let mut registration = soon("register", registry.register(record("a", 1))).await.unwrap();
    time::sleep(TTL * 3).await;
    let ready = |record: &mut WorkerRecord| record.state = WorkerState::Ready;
    soon("update", registration.update(ready)).await.unwrap();
    etcd.kill();
    etcd.restart();
    etcd.ready();
    let draining = |record: &mut WorkerRecord| record.state = WorkerState::Draining;
    soon("update", registration.update(draining)).await.unwrap();
    soon("leave", registration.leave()).await;
    fs::remove_file(&key).unwrap();
}
