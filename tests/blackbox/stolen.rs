//! What a stolen issuing key is good for: a certificate that verifiers take until the key is tainted, and nothing of keyward's.

use std::sync::Mutex;

use keyward::model::{AGENT_EXTENSION_OID, AgentExtension, AgentId, PublicKey, Serial};
use rcgen::{
    CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PublicKeyData, SanType, SerialNumber, SignatureAlgorithm, SigningKey,
};
use rustls::pki_types::CertificateDer;
use sha2::Digest as _;
use time::{Duration, OffsetDateTime};

use crate::crash::Holder;
use crate::house::keys::{digest, wish};
use crate::house::wire::{Draft, Identity, refused};
use crate::house::{Body, DOMAIN, House, certificates};
use crate::instruments::{sign_with, unhex};

/// The issuing key in the hands of somebody who can use it, and says nothing of it to the ledger.
struct Stolen<'h> {
    house: &'h House,
    id: Vec<u8>,
    public: PublicKey,
    /// A house is not to be shared between threads.
    one: Mutex<()>,
}

impl PublicKeyData for Stolen<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.public.raw()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for Stolen<'_> {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let _one = self.one.lock().unwrap();
        let raw = sign_with(self.house, "authority", &self.id, &sha2::Sha256::digest(message));
        let mut body = Vec::new();
        for number in [&raw[..32], &raw[32..]] {
            let digits = &number[number.iter().position(|byte| *byte != 0).unwrap()..];
            let sign: &[u8] = if digits[0] & 0x80 == 0 { &[] } else { &[0] };
            body.extend([2, u8::try_from(sign.len() + digits.len()).unwrap()]);
            body.extend([sign, digits].concat());
        }
        Ok([vec![0x30, u8::try_from(body.len()).unwrap()], body].concat())
    }
}

impl<'h> Stolen<'h> {
    fn of(house: &'h House) -> Self {
        let all = house.keyward(&["ca", "list", "--format", "json"]).ok().json();
        let is_it = |one: &&serde_json::Value| one["purpose"] == "issuing" && one["state"] == "active";
        let id = unhex(all.as_array().unwrap().iter().find(is_it).unwrap()["key_id"].as_str().unwrap());
        let [certificate] = certificates(&house.state().join("issuing.pem")).try_into().unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).unwrap();
        Self { house, id, public: PublicKey::from_spki(parsed.public_key().raw).unwrap(), one: Mutex::default() }
    }

    /// A certificate for `key` as an agent's, a day long.
    fn forge(self, agent: &str, serial: &Serial, key: &rcgen::KeyPair) -> Identity {
        let [issuing] = certificates(&self.house.state().join("issuing.pem")).try_into().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.serial_number = Some(SerialNumber::from_slice(&serial.0));
        params.not_before = OffsetDateTime::now_utc() - Duration::seconds(30);
        params.not_after = OffsetDateTime::now_utc() + Duration::DAY;
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{DOMAIN}/agent/{agent}").try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        let lineage_root = AgentId::parse(agent).unwrap();
        let extension = AgentExtension { epoch: 1, lineage_root, appraisal_index: 1, policy_hash: None };
        params.custom_extensions = vec![CustomExtension::from_oid_content(&AGENT_EXTENSION_OID, extension.to_der())];
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(issuing.clone()), self).unwrap();
        let certificate = params.signed_by(key, &issuer).unwrap();
        Identity { chain: vec![certificate.der().to_vec(), issuing], key: key.serialize_der() }
    }
}

#[test]
fn a_certificate_that_the_book_does_not_know_uses_no_key_and_follows_nothing() {
    let mut house = House::serving();
    {
        let agent = house.attested("builder/1");
        let holder = Identity::of(&agent);
        house.keys(&holder).create(wish("release")).unwrap();
        let copied = Serial::from_slice(&agent.serial()).unwrap();
        // Under a serial of its own, and under that of the agent's certificate.
        for serial in [Serial::random(), copied] {
            let thief = Stolen::of(&house).forge("builder/1", &serial, &rcgen::KeyPair::generate().unwrap());
            let mut keys = house.keys(&thief);
            refused(keys.sign("release", digest(b"anything")), "UNAUTHENTICATED");
            refused(keys.create(wish("another")), "UNAUTHENTICATED");
            refused(keys.list(""), "UNAUTHENTICATED");
            refused(house.wire().watch_bundle(Some(&thief)), "UNAUTHENTICATED");
        }
        // The agent itself, with a longer life than it was given.
        let longer = Stolen::of(&house).forge("builder/1", &Serial::random(), &holder.pair());
        refused(house.keys(&longer).sign("release", digest(b"anything")), "UNAUTHENTICATED");
        house.keys(&holder).sign("release", digest(b"anything")).unwrap();
        agent.renew().ok();
        house.keys(&holder).sign("release", digest(b"the certificate before is in force still")).unwrap();
    }
    house.restart();
    house.keys(&Identity::of(&house.agent("builder/1"))).sign("release", digest(b"anything")).unwrap();
    house.stop_and_verify();
}

#[test]
fn a_stolen_issuing_key_neither_renews_for_an_agent_nor_puts_one_into_quarantine() {
    let mut house = House::serving();
    {
        let mut holder = Holder::attest(&house, "builder/1");
        assert!(holder.renew(&house) && holder.renew(&house));
        let thief = Stolen::of(&house).forge("builder/1", &Serial::random(), &rcgen::KeyPair::generate().unwrap());
        for sequence in 0..5 {
            let draft = Draft::bound("builder/1", sequence);
            let mut unproved = draft.renewal(&thief);
            refused(
                house.wire().renew(Some(&thief), unproved.clone()),
                if sequence > 3 { "SEQUENCE_AHEAD" } else { "PROOF_INVALID" },
            );
            unproved.proof.clear();
            refused(house.wire().renew(Some(&thief), unproved), if sequence > 3 { "SEQUENCE_AHEAD" } else { "PROOF_INVALID" });
        }
        holder.try_renew(&house).unwrap();
    }
    let entries = house.stopped_entries();
    assert!(!entries.iter().any(|body| matches!(body, Body::Quarantined(_))));
    house.verify().ok();
}
