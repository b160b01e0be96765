//! `keyward key`: signing keys that an agent uses and never holds.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand};

use super::key_show::{Ended, KeyShown, Signed, Verified, keys_table, public_key_pem};
use super::key_terms::{Algorithm, Purpose, Storage};
use super::{EXIT_REFUSED, Failure, Global, Output, duration};
use crate::client::{self, key::Keys};
use crate::model::{AgentId, KeyName, Reason, unhex};
use crate::proto::{self, KeyAccounting, KeyAlgorithm, KeyPurpose, KeyStorage, content, verify_request};

/// Largest payload that is read, in bytes: what the daemon takes, and one more to be refused.
const PAYLOAD_BYTES_MAX: u64 = 65_537;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Make a key. Asked for again with the same terms it is the same key.
    #[command(
        after_help = "Examples:\n  keyward key create tokens --dir /run/coder --purpose jws\n  keyward key create meter --dir /run/coder --purpose raw-digest --counted --signatures-max 100000 --ttl 1d"
    )]
    Create {
        /// 1 to 64 of a-z, 0-9 and -
        #[arg(value_parser = name)]
        name: String,
        #[command(flatten)]
        own: Own,
        /// The one thing that the key signs.
        #[arg(long, value_enum)]
        purpose: Purpose,
        /// What it signs with.
        #[arg(long, value_enum, default_value = "es256")]
        algorithm: Algorithm,
        /// Where it lives [default: wrapped where the token can wrap, else resident].
        #[arg(long, value_enum)]
        storage: Option<Storage>,
        /// Count its signatures in blocks instead of recording each.
        #[arg(long)]
        counted: bool,
        /// Signatures it may make [default: no end].
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
        signatures_max: Option<u64>,
        /// Life of each of its versions [default: 30d].
        #[arg(long, value_parser = duration::seconds, value_name = "DURATION")]
        ttl: Option<u32>,
    },
    /// Sign with a key what it is for: a payload, a digest, an HTTP message, a DPoP proof, a TLS handshake.
    ///
    /// Standard output has the result alone: the JWS, the value of the field DPoP, the fields of the HTTP message, or for a digest and TLS
    /// the signature in base64 (ECDSA: DER).
    #[command(
        after_help = "Examples:\n  keyward key sign tokens --dir /run/coder --payload claims.json --typ JWT\n  keyward key sign meter --dir /run/coder --digest $(sha256sum report | cut -c1-64)\n  keyward key sign web --dir /run/coder --component '@method=POST' --component '@authority=api.example' --nonce $(openssl rand -hex 16)\n  keyward key sign proof --dir /run/coder --method POST --uri https://api.example/token"
    )]
    Sign {
        /// The key.
        #[arg(value_parser = name)]
        name: String,
        #[command(flatten)]
        own: Own,
        #[command(flatten)]
        content: ContentArgs,
    },
    /// Verify what an agent's key has signed, as an agent.
    ///
    /// An HTTP message is accepted once, by its nonce, or without one by what was signed; so are a DPoP proof and a JWS with --audience.
    #[command(
        after_help = "Examples:\n  keyward key verify --dir /run/coder --jws token.jws --audience https://api.example\n  keyward key verify --dir /run/coder --signer coder/8 --dpop proof.jws --method POST --uri https://api.example/token\n  keyward key verify --dir /run/coder --signature-input \"$INPUT\" --signature \"$SIGNATURE\" --component '@method=POST' --component '@authority=api.example'"
    )]
    Verify {
        #[command(flatten)]
        own: Own,
        /// Who must have signed [default: any agent; it is shown who].
        #[arg(long, value_parser = AgentId::parse, value_name = "AGENT")]
        signer: Option<AgentId>,
        #[command(flatten)]
        message: MessageArgs,
    },
    /// Show a key of one's own: its terms, how many signatures count against its budget, its versions that have not expired.
    #[command(
        after_help = "Examples:\n  keyward key show tokens --dir /run/coder\n  keyward key show meter --dir /run/coder --pem > meter.pub"
    )]
    Show {
        /// The key.
        #[arg(value_parser = name)]
        name: String,
        #[command(flatten)]
        own: Own,
        /// Print the newest version's public key as PEM (SubjectPublicKeyInfo).
        #[arg(long)]
        pem: bool,
    },
    /// List keys: an agent its own, an operator those of any agent.
    #[command(after_help = "Examples:\n  keyward key list --dir /run/coder\n  keyward key list --agent coder/7 --format json")]
    List {
        #[command(flatten)]
        whose: Whose,
    },
    /// Give a key a new version, which signs from now on. Older ones verify until they expire.
    #[command(after_help = "Example:\n  keyward key rotate tokens --dir /run/coder")]
    Rotate {
        /// The key.
        #[arg(value_parser = name)]
        name: String,
        #[command(flatten)]
        own: Own,
    },
    /// Have a key sign no more. What it signed verifies until it expires.
    #[command(
        after_help = "Examples:\n  keyward key disable tokens --dir /run/coder --yes\n  keyward key disable tokens --agent coder/7 --reason 'case 1234' --yes"
    )]
    Disable {
        #[command(flatten)]
        end: End,
    },
    /// Destroy a key: it signs no more, and nothing that it signed verifies.
    #[command(
        after_help = "Examples:\n  keyward key destroy tokens --dir /run/coder --yes\n  keyward key destroy tokens --agent coder/7 --reason 'case 1234' --yes"
    )]
    Destroy {
        #[command(flatten)]
        end: End,
    },
    /// Print the keys by which an agent's signatures, or those of a class, verify (JWKS, RFC 7517): as an agent, or as an operator.
    #[command(
        after_help = "Examples:\n  keyward key jwks --class coder\n  keyward key jwks --dir /run/coder --of coder/8",
        group = ArgGroup::new("signers").required(true)
    )]
    Jwks {
        /// Directory of the credentials of the agent that asks [default: an operator asks, over the daemon's socket].
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Whose.
        #[arg(long, value_parser = AgentId::parse, value_name = "AGENT", group = "signers")]
        of: Option<AgentId>,
        /// Of all agents of this class.
        #[arg(long, value_name = "CLASS", group = "signers")]
        class: Option<String>,
    },
}

/// The agent that asks.
#[derive(Debug, Args)]
pub(super) struct Own {
    /// Directory of the agent's credentials.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

/// An agent by its directory, or any agent by its name.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Whose {
    /// Directory of the agent's credentials.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Any agent (operator).
    #[arg(long, value_parser = AgentId::parse, value_name = "AGENT")]
    agent: Option<AgentId>,
}

/// Which key ends, and why.
#[derive(Debug, Args)]
pub(super) struct End {
    /// The key.
    #[arg(value_parser = name)]
    name: String,
    #[command(flatten)]
    whose: Whose,
    /// Why; kept in the ledger, at most 256 characters (operator).
    #[arg(long, value_parser = super::quarantine::reason, requires = "agent", required_unless_present = "dir")]
    reason: Option<String>,
    /// Do it without showing what it affects and asking first.
    #[arg(long)]
    yes: bool,
}

/// What is to be signed; the key's purpose says which of these belong together.
#[derive(Debug, Args)]
pub(super) struct ContentArgs {
    /// raw-digest: in hexadecimal.
    #[arg(long, value_name = "HEX", group = "content")]
    digest: Option<String>,
    /// jws: the payload's file, or - for standard input.
    #[arg(long, value_name = "FILE", group = "content")]
    payload: Option<PathBuf>,
    /// http-message-signature: a covered component with its value; repeated, in order.
    #[arg(long = "component", value_name = "ID=VALUE", group = "content")]
    components: Vec<String>,
    /// dpop: the method.
    #[arg(long, value_name = "METHOD", requires = "uri", group = "content")]
    method: Option<String>,
    /// tls: the transcript hash in hexadecimal.
    #[arg(long, value_name = "HEX", group = "content")]
    transcript_hash: Option<String>,
    /// jws: typ.
    #[arg(long, value_name = "TYPE", requires = "payload")]
    typ: Option<String>,
    /// jws: further header members, as a JSON object.
    #[arg(long, value_name = "JSON", requires = "payload")]
    header: Option<String>,
    /// jws: leave the payload out of the result.
    #[arg(long, requires = "payload")]
    detached: bool,
    /// http-message-signature: label.
    #[arg(long, value_name = "LABEL", requires = "components")]
    label: Option<String>,
    /// http-message-signature: how long it is good for [default: it does not say].
    #[arg(long, value_parser = duration::seconds, value_name = "DURATION", requires = "components")]
    lifetime: Option<u32>,
    /// http-message-signature: tag.
    #[arg(long, value_name = "TAG", requires = "components")]
    tag: Option<String>,
    /// dpop: the URI, without query and fragment.
    #[arg(long, value_name = "URI", requires = "method")]
    uri: Option<String>,
    /// dpop: SHA-256 of the access token, in hexadecimal.
    #[arg(long, value_name = "HEX", requires = "method")]
    token_sha256: Option<String>,
    /// dpop, http-message-signature: nonce. Without one, two HTTP messages that are the same within a second are one to a verifier.
    #[arg(long, value_name = "NONCE")]
    nonce: Option<String>,
    /// tls: sign as the server.
    #[arg(long, requires = "transcript_hash")]
    server: bool,
}

/// What was received.
#[derive(Debug, Args)]
pub(super) struct MessageArgs {
    /// A JWS: its file, or - for standard input.
    #[arg(long, value_name = "FILE", group = "received")]
    jws: Option<PathBuf>,
    /// A DPoP proof: its file, or - for standard input.
    #[arg(long, value_name = "FILE", group = "received", requires_all = ["method", "uri"])]
    dpop: Option<PathBuf>,
    /// An HTTP message's field Signature-Input.
    #[arg(long, value_name = "FIELD", group = "received", requires = "signature")]
    signature_input: Option<String>,
    /// jws: the payload that did not travel.
    #[arg(long, value_name = "FILE", requires = "jws")]
    detached_payload: Option<PathBuf>,
    /// jws: the payload has to be claims for this audience, in their time, seen the first time.
    #[arg(long, value_name = "AUDIENCE", requires = "jws")]
    audience: Option<String>,
    /// dpop: the method.
    #[arg(long, value_name = "METHOD", requires = "dpop")]
    method: Option<String>,
    /// dpop: the URI.
    #[arg(long, value_name = "URI", requires = "dpop")]
    uri: Option<String>,
    /// dpop: SHA-256 of the access token that came along, in hexadecimal.
    #[arg(long, value_name = "HEX", requires = "dpop")]
    token_sha256: Option<String>,
    /// An HTTP message's field Signature.
    #[arg(long, value_name = "FIELD", requires = "signature_input")]
    signature: Option<String>,
    /// A component of the HTTP message with its value; repeated.
    #[arg(long = "component", value_name = "ID=VALUE", requires = "signature_input")]
    components: Vec<String>,
    /// A component that has to be covered; repeated.
    #[arg(long = "require", value_name = "ID", requires = "signature_input")]
    required: Vec<String>,
    /// The tag that has to be there.
    #[arg(long, value_name = "TAG", requires = "signature_input")]
    tag: Option<String>,
    /// The nonce that was given out [default: any, or none].
    #[arg(long, value_name = "NONCE")]
    nonce: Option<String>,
}

/// A clap value parser.
fn name(text: &str) -> Result<String, String> {
    KeyName::parse(text).map(|name| name.to_string()).map_err(|error| error.to_string())
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    match verb {
        Verb::Create { name, own, purpose, algorithm, storage, counted, signatures_max, ttl } => {
            let mut keys = Keys::of_agent(&own.dir).await?;
            let accounting = if counted { KeyAccounting::Counted } else { KeyAccounting::Recorded };
            let request = proto::CreateKeyRequest {
                name,
                purpose: KeyPurpose::from(purpose).into(),
                algorithm: KeyAlgorithm::from(algorithm).into(),
                storage: storage.map_or(KeyStorage::Unspecified, KeyStorage::from).into(),
                accounting: accounting.into(),
                signatures_max: signatures_max.unwrap_or(0),
                ttl_seconds: ttl.unwrap_or(0),
            };
            let answer = keys.service.create_key(request).await.map_err(|status| not_made(keys.failed(&status)))?.into_inner();
            show(answer.key, output)
        }
        Verb::Sign { name, own, content } => {
            let content = content.content()?;
            let mut keys = Keys::of_agent(&own.dir).await?;
            let request = proto::SignRequest { key: name, content: Some(content) };
            let answer = keys.service.sign(request).await.map_err(|status| keys.failed(&status))?.into_inner();
            Ok(output.show(&Signed::of(answer)?, Signed::text)?)
        }
        Verb::Verify { own, signer, message } => {
            let message = message.message()?;
            let mut keys = Keys::of_agent(&own.dir).await?;
            let agent = signer.map(|signer| signer.to_string()).unwrap_or_default();
            let request = proto::VerifyRequest { agent, message: Some(message) };
            let answer = keys.service.verify(request).await.map_err(|status| keys.failed(&status))?.into_inner();
            Ok(output.show(&Verified::of(answer), Verified::text)?)
        }
        Verb::List { whose } => {
            let listed = list(&whose, global).await?;
            Ok(output.show(&listed, |listed| keys_table(listed))?)
        }
        Verb::Show { name, own, pem } => {
            let mut keys = Keys::of_agent(&own.dir).await?;
            let request = proto::GetPublicKeyRequest { key: name };
            let answer = keys.service.get_public_key(request).await.map_err(|status| keys.failed(&status))?.into_inner();
            let key = answer.key.ok_or_else(unanswered)?;
            match key.versions.first() {
                Some(newest) if pem => Ok(output.raw(public_key_pem(&newest.spki).as_bytes())?),
                _ => Ok(output.show(&KeyShown::of(key), KeyShown::text_with_versions)?),
            }
        }
        Verb::Rotate { name, own } => {
            let mut keys = Keys::of_agent(&own.dir).await?;
            let request = proto::RotateKeyRequest { key: name, version: 0 };
            let answer = keys.service.rotate_key(request).await.map_err(|status| keys.failed(&status))?.into_inner();
            show(answer.key, output)
        }
        Verb::Disable { end } => {
            confirm(&end, "Disable it? It signs no more.", global, output).await?;
            let (mut keys, agent) = end.whose.connect(global).await?;
            let request =
                proto::DisableKeyRequest { agent, key: end.name.clone(), epoch: 0, reason: end.reason.unwrap_or_default() };
            let answer = keys.service.disable_key(request).await.map_err(|status| keys.failed(&status))?.into_inner();
            Ok(output.show(&Ended::of(&end.name, "disabled", answer.ledger_index), Ended::text)?)
        }
        Verb::Destroy { end } => {
            confirm(&end, "Destroy it? Nothing that it signed verifies any more.", global, output).await?;
            let (mut keys, agent) = end.whose.connect(global).await?;
            let request =
                proto::DestroyKeyRequest { agent, key: end.name.clone(), epoch: 0, reason: end.reason.unwrap_or_default() };
            let answer = keys.service.destroy_key(request).await.map_err(|status| keys.failed(&status))?.into_inner();
            Ok(output.show(&Ended::of(&end.name, "destroyed", answer.ledger_index), Ended::text)?)
        }
        Verb::Jwks { dir, of, class } => {
            let mut keys = match dir {
                Some(dir) => Keys::of_agent(&dir).await?,
                None => Keys::of_operator(&global.socket()?).await?,
            };
            let whose = match (of, class) {
                (Some(agent), _) => proto::get_jwks_request::Of::Agent(agent.to_string()),
                (None, class) => proto::get_jwks_request::Of::Class(class.unwrap_or_default()),
            };
            jwks(&mut keys, &whose, output).await
        }
    }
}

/// All pages as one set.
async fn jwks(keys: &mut Keys, whose: &proto::get_jwks_request::Of, output: &mut Output) -> Result<(), Failure> {
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let request = proto::GetJwksRequest { of: Some(whose.clone()), after };
        let answer = keys.service.get_jwks(request).await.map_err(|status| keys.failed(&status))?.into_inner();
        let page: serde_json::Value = serde_json::from_str(&answer.jwks).map_err(|error| Failure::error(error.to_string()))?;
        all.extend(page["keys"].as_array().into_iter().flatten().cloned());
        if answer.next.is_empty() {
            let set = serde_json::json!({ "keys": all });
            return Ok(output.raw(format!("{set:#}\n").as_bytes())?);
        }
        after = answer.next;
    }
}

impl Whose {
    /// A connection, and the agent to be named over it.
    async fn connect(&self, global: &Global) -> Result<(Keys, String), Failure> {
        Ok(match (&self.dir, &self.agent) {
            (Some(dir), _) => (Keys::of_agent(dir).await?, String::new()),
            (None, agent) => {
                let agent = agent.as_ref().map(ToString::to_string).unwrap_or_default();
                (Keys::of_operator(&global.socket()?).await?, agent)
            }
        })
    }
}

async fn list(whose: &Whose, global: &Global) -> Result<Vec<KeyShown>, Failure> {
    let (mut keys, agent) = whose.connect(global).await?;
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let request = proto::ListKeysRequest { agent: agent.clone(), after, limit: 1000, epoch: 0 };
        let page = keys.service.list_keys(request).await.map_err(|status| keys.failed(&status))?.into_inner();
        all.extend(page.keys.into_iter().map(KeyShown::of));
        if page.next.is_empty() {
            return Ok(all);
        }
        after = page.next;
    }
}

async fn confirm(end: &End, question: &str, global: &Global, output: &mut Output) -> Result<(), Failure> {
    if end.yes {
        return Ok(());
    }
    let affected: Vec<_> = list(&end.whose, global).await?.into_iter().filter(|key| key.name == end.name).collect();
    output.say(&keys_table(&affected));
    if output.confirms(question) {
        Ok(())
    } else {
        Err(Failure::usage("nothing was done; add --yes to do it without being asked"))
    }
}

/// An algorithm that the purpose does not take has the reason of one that does not verify; here nothing was verified.
fn not_made(error: client::Error) -> Failure {
    let is_of_the_wish = error.refused().is_some_and(|refused| refused.reason == Reason::AlgorithmRefused);
    let failure = Failure::from(error);
    if is_of_the_wish { failure.with_code(EXIT_REFUSED) } else { failure }
}

fn unanswered() -> Failure {
    Failure::error("the daemon answered without a key")
}

fn show(key: Option<proto::Key>, output: &mut Output) -> Result<(), Failure> {
    let key = key.ok_or_else(unanswered)?;
    Ok(output.show(&KeyShown::of(key), KeyShown::text)?)
}

fn hexadecimal(text: &str) -> Result<Vec<u8>, Failure> {
    unhex(text.trim()).ok_or_else(|| Failure::usage(format!("{text:?} is not hexadecimal")))
}

fn file(path: &Path) -> Result<Vec<u8>, Failure> {
    let told = |error: std::io::Error| Failure::error(format!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        std::io::stdin().take(PAYLOAD_BYTES_MAX).read_to_end(&mut bytes).map_err(told)?;
    } else {
        std::fs::File::open(path).map_err(told)?.take(PAYLOAD_BYTES_MAX).read_to_end(&mut bytes).map_err(told)?;
    }
    Ok(bytes)
}

fn text(path: &Path) -> Result<String, Failure> {
    let text = String::from_utf8(file(path)?).map_err(|_| Failure::error(format!("{}: not text", path.display())))?;
    Ok(text.trim().to_owned())
}

fn components(all: Vec<String>) -> Result<Vec<content::Component>, Failure> {
    let one = |text: String| -> Result<_, Failure> {
        // A parameter of an identifier may hold an equals sign; what is quoted is part of the identifier.
        let quoted = text.rfind('"').filter(|_| text.starts_with('"')).unwrap_or(0);
        let at = text[quoted..].find('=').map(|at| quoted + at);
        let at = at.ok_or_else(|| Failure::usage(format!("{text:?} is not ID=VALUE")))?;
        Ok(content::Component { identifier: text[..at].to_owned(), value: text[at + 1..].to_owned() })
    };
    all.into_iter().map(one).collect()
}

impl ContentArgs {
    fn content(self) -> Result<proto::Content, Failure> {
        let content = if let Some(digest) = &self.digest {
            content::Content::Digest(hexadecimal(digest)?)
        } else if let Some(payload) = &self.payload {
            content::Content::Jws(content::Jws {
                payload: file(payload)?,
                typ: self.typ.unwrap_or_default(),
                header: self.header.unwrap_or_default().into_bytes(),
                detached: self.detached,
            })
        } else if !self.components.is_empty() {
            content::Content::HttpMessage(content::HttpMessage {
                label: self.label.unwrap_or_default(),
                components: components(self.components)?,
                lifetime_seconds: self.lifetime.unwrap_or(0),
                nonce: self.nonce.unwrap_or_default(),
                tag: self.tag.unwrap_or_default(),
            })
        } else if let Some(method) = self.method {
            content::Content::Dpop(content::DpopProof {
                method,
                uri: self.uri.unwrap_or_default(),
                access_token_sha256: self.token_sha256.as_deref().map_or(Ok(Vec::new()), hexadecimal)?,
                nonce: self.nonce.unwrap_or_default(),
            })
        } else if let Some(hash) = &self.transcript_hash {
            let transcript_hash = hexadecimal(hash)?;
            content::Content::Tls(content::TlsHandshake { server: self.server, transcript_hash })
        } else {
            return Err(Failure::usage(
                "say what is to be signed: --payload, --digest, --component, --method or --transcript-hash",
            ));
        };
        Ok(proto::Content { content: Some(content) })
    }
}

impl MessageArgs {
    fn message(self) -> Result<verify_request::Message, Failure> {
        if let Some(token) = &self.jws {
            return Ok(verify_request::Message::Jws(verify_request::Jws {
                token: text(token)?,
                detached_payload: self.detached_payload.as_deref().map(file).transpose()?,
                audience: self.audience.unwrap_or_default(),
                lifetime_seconds_max: 0,
            }));
        }
        if let Some(proof) = &self.dpop {
            return Ok(verify_request::Message::Dpop(verify_request::Dpop {
                proof: text(proof)?,
                method: self.method.unwrap_or_default(),
                uri: self.uri.unwrap_or_default(),
                access_token_sha256: self.token_sha256.as_deref().map_or(Ok(Vec::new()), hexadecimal)?,
                nonce: self.nonce.unwrap_or_default(),
            }));
        }
        let Some(signature_input) = self.signature_input else {
            return Err(Failure::usage("say what is to be verified: --jws, --dpop or --signature-input"));
        };
        Ok(verify_request::Message::Http(verify_request::Http {
            signature_input,
            signature: self.signature.unwrap_or_default(),
            label: String::new(),
            components: components(self.components)?,
            required: self.required,
            tag: self.tag.unwrap_or_default(),
            nonce: self.nonce.unwrap_or_default(),
            lifetime_seconds_max: 0,
        }))
    }
}
