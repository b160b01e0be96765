//! The hooked functions by name, and how often each was called.

use std::sync::atomic::{AtomicU64, Ordering};

use cryptoki_sys::{CK_RV, CKR_DEVICE_REMOVED, CKR_TOKEN_NOT_PRESENT};

macro_rules! functions {
    ($($name:ident)*) => {
        /// A hooked function, called as PKCS#11 calls it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(non_camel_case_types, reason = "PKCS#11 names its functions")]
        pub enum Function {
            $($name),*
        }

        impl Function {
            pub const ALL: &[Self] = &[$(Self::$name),*];

            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name)),*
                }
            }
        }
    };
}

functions! {
    C_Initialize C_Finalize C_GetInfo C_GetSlotList C_GetSlotInfo C_GetTokenInfo C_GetMechanismList C_GetMechanismInfo
    C_InitToken C_InitPIN C_SetPIN
    C_OpenSession C_CloseSession C_CloseAllSessions C_GetSessionInfo C_Login C_Logout
    C_CreateObject C_CopyObject C_DestroyObject C_GetAttributeValue C_SetAttributeValue
    C_FindObjectsInit C_FindObjects C_FindObjectsFinal
    C_EncryptInit C_Encrypt C_EncryptUpdate C_EncryptFinal C_DecryptInit C_Decrypt C_DecryptUpdate C_DecryptFinal
    C_DigestInit C_Digest C_DigestUpdate C_DigestKey C_DigestFinal
    C_SignInit C_Sign C_SignUpdate C_SignFinal C_VerifyInit C_Verify C_VerifyUpdate C_VerifyFinal
    C_GenerateKey C_GenerateKeyPair C_WrapKey C_UnwrapKey C_DeriveKey C_SeedRandom C_GenerateRandom
}

/// How many there are.
pub const COUNT: usize = Function::ALL.len();

static CALLS: [AtomicU64; COUNT] = [const { AtomicU64::new(0) }; COUNT];

impl Function {
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|function| function.name() == name)
    }

    /// One more call.
    pub fn count(self) {
        CALLS[self as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Calls since the module was loaded.
    pub fn calls(self) -> u64 {
        CALLS[self as usize].load(Ordering::Relaxed)
    }

    /// What it answers while the device is gone.
    pub fn without_device(self) -> CK_RV {
        use Function as F;
        match self {
            F::C_GetSlotInfo
            | F::C_GetTokenInfo
            | F::C_GetMechanismList
            | F::C_GetMechanismInfo
            | F::C_InitToken
            | F::C_OpenSession
            | F::C_CloseAllSessions => CKR_TOKEN_NOT_PRESENT,
            _ => CKR_DEVICE_REMOVED,
        }
    }
}
