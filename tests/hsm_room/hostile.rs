//! A module that answers badly at the worst moment, and what must hold nevertheless.

use std::fs;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use keyward::hsm::{Error, Hsm, Modules, Settings, SignError};
use keyward::model::Algorithm;

use super::shim::Shim;
use super::{House, in_house, new_key, until};

fn behind_the_shim(house: &House, label: &str) -> Settings {
    let mut settings = house.settings(label);
    settings.token.module = super::shim_module();
    settings.token.lanes = 1;
    settings.sign_deadline = Duration::from_secs(2);
    settings
}

fn shim(house: &House) -> Shim {
    Shim::at(&house.0.join("shim.sock"))
}

fn logins(house: &House) -> usize {
    fs::read_to_string(house.0.join("shim.log")).unwrap().lines().filter(|line| *line == "login").count()
}

#[test]
fn status_is_told_while_the_module_hangs_closing_an_old_session() {
    in_house("hostile::status_is_told_while_the_module_hangs_closing_an_old_session", async |house| {
        let hsm = Hsm::open(&Modules::new(), behind_the_shim(&house, "authority"), Arc::default()).unwrap();
        let key = new_key(&hsm, Algorithm::P256).await;
        let shim = shim(&house);
        // The login is lost. The lane closes its session, the admin lane its own, the third is the old anchor.
        shim.tell("hang C_CloseSession nth=3");
        shim.tell("logout");
        shim.tell("fail C_SignInit rv=0x101");
        assert!(key.sign(b"lost"[..].into()).await.is_err());
        shim.tell("await hanging=1");
        let (told, answer) = mpsc::channel();
        let asked = hsm.clone();
        std::thread::spawn(move || drop(told.send(asked.status())));
        let status = answer.recv_timeout(Duration::from_secs(3));
        shim.tell("release");
        assert!(!status.expect("no status while a call hangs").usable);
        until("it is back", Duration::from_secs(10), || hsm.status().usable).await;
        hsm.shut_down(Duration::from_secs(5));
    });
}

/// Some modules have no better word for a wrong PIN than that something went wrong, and the token counts it all the same.
#[test]
fn a_login_that_failed_for_no_clear_reason_and_was_counted_is_not_tried_again() {
    in_house("hostile::a_login_that_failed_for_no_clear_reason_and_was_counted_is_not_tried_again", async |house| {
        let hsm = Hsm::open(&Modules::new(), behind_the_shim(&house, "authority"), Arc::default()).unwrap();
        let key = new_key(&hsm, Algorithm::P256).await;
        let shim = shim(&house);
        let (good, before) = (fs::read(house.pin("authority")).unwrap(), logins(&house));
        shim.tell("pin_tries n=10");
        for code in ["0x05", "0x30", "0x80000001"] {
            fs::write(house.pin("authority"), "wrong-pin-0815").unwrap();
            let before = logins(&house);
            shim.tell(&format!("fail C_Login rv={code} count=all after"));
            shim.tell("logout");
            shim.tell("fail C_SignInit rv=0x101");
            assert!(key.sign(b"lost"[..].into()).await.is_err());
            until("it waits for the operator", Duration::from_secs(5), || {
                hsm.status().pin_pending && { hsm.status().fault.is_some_and(|fault| fault.contains("keyward hsm unlock")) }
            })
            .await;
            assert_eq!(logins(&house) - before, 1, "{code}");
            fs::write(house.pin("authority"), &good).unwrap();
            shim.tell("clear");
            shim.tell("pin_tries n=10");
            assert!(keyward::hsm::unlock(&house.settings("authority").state, keyward::proto::TokenRole::Authority).unwrap());
            until("it is back", Duration::from_secs(10), || hsm.status().usable).await;
        }
        assert!(logins(&house) > before);
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_login_that_never_reached_the_pin_is_tried_again() {
    in_house("hostile::a_login_that_never_reached_the_pin_is_tried_again", async |house| {
        let hsm = Hsm::open(&Modules::new(), behind_the_shim(&house, "authority"), Arc::default()).unwrap();
        let key = new_key(&hsm, Algorithm::P256).await;
        let shim = shim(&house);
        for code in ["0x05", "0x30", "0x80000001"] {
            shim.tell(&format!("fail C_Login rv={code} count=2"));
            shim.tell("logout");
            shim.tell("fail C_SignInit rv=0x101");
            assert!(key.sign(b"lost"[..].into()).await.is_err());
            until("it is back", Duration::from_secs(10), || hsm.status().usable).await;
        }
        hsm.shut_down(Duration::from_secs(5));
    });
}

/// It fails over to a slower one, say: the pace that was learnt from the fast one must not make it look silent again and again.
#[test]
fn a_token_that_has_become_slow_is_called_lost_once_at_most() {
    in_house("hostile::a_token_that_has_become_slow_is_called_lost_once_at_most", async |house| {
        let hsm = Hsm::open(&Modules::new(), behind_the_shim(&house, "authority"), Arc::default()).unwrap();
        let key = new_key(&hsm, Algorithm::P256).await;
        hsm.set_canary(new_key(&hsm, Algorithm::P256).await);
        for _ in 0..130 {
            key.sign(b"fast"[..].into()).await.unwrap();
        }
        shim(&house).tell("delay C_Sign ms=500");
        until("it was taken for lost and is back", Duration::from_secs(10), || {
            let status = hsm.status();
            status.usable && status.reconnects > 0
        })
        .await;
        let signed = hsm.status().signatures;
        until("six canaries", Duration::from_secs(20), || hsm.status().signatures >= signed + 6).await;
        assert!(hsm.status().usable && hsm.status().reconnects == 1, "{:?}", hsm.status());
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_key_that_was_taken_for_another_is_looked_for_until_it_is_there() {
    in_house("hostile::a_key_that_was_taken_for_another_is_looked_for_until_it_is_there", async |house| {
        let hsm = Hsm::open(&Modules::new(), behind_the_shim(&house, "authority"), Arc::default()).unwrap();
        let key = new_key(&hsm, Algorithm::P256).await;
        key.sign(b"before"[..].into()).await.unwrap();
        // The signature is spoilt, and then the one by which the key is to be known again.
        shim(&house).tell("corrupt C_Sign count=2");
        assert!(matches!(key.sign(b"spoilt"[..].into()).await, Err(SignError::Unknown(Error::Corrupt(_)))));
        assert!(matches!(key.sign(b"another"[..].into()).await, Err(SignError::NotSigned(Error::KeyMismatch(_)))));
        let health = hsm.health();
        until("it is told", Duration::from_secs(1), || health.borrow().key.is_some()).await;
        until("it is found again", Duration::from_secs(3), || health.borrow().key.is_none()).await;
        assert!(hsm.status().usable && hsm.status().reconnects == 0, "{:?}", hsm.status());
        key.sign(b"after"[..].into()).await.unwrap();
        hsm.shut_down(Duration::from_secs(5));
    });
}
