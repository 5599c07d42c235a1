//! The store that the ranks of a cluster share: `TCPStore` of PyTorch's distributed runtime.
//!
//! It has no authentication: whoever reaches its address can read and change it.

#![expect(
    unsafe_code,
    reason = "calls the C functions of shim/store.cpp, whose signatures are declared here"
)]

use std::ffi::{CString, c_char, c_void};
use std::net::{IpAddr, TcpListener, ToSocketAddrs};
use std::os::fd::IntoRawFd;
use std::ptr::null_mut;

use super::shim;
use ovchat_models::{Board, ModelError, RankPlace};

unsafe extern "C" {
    fn ovchat_store_open(
        out: *mut *mut c_void,
        host: *const c_char,
        port: u16,
        listener: i32,
        seconds: i64,
    ) -> *mut c_char;
    fn ovchat_store_close(store: *mut c_void);
    fn ovchat_store_add(
        store: *mut c_void,
        key: *const c_char,
        by: i64,
        sum: *mut i64,
    ) -> *mut c_char;
    fn ovchat_store_set(
        store: *mut c_void,
        key: *const c_char,
        value: *const u8,
        size: usize,
    ) -> *mut c_char;
    fn ovchat_store_get(
        store: *mut c_void,
        key: *const c_char,
        value: *mut *mut u8,
        size: *mut usize,
    ) -> *mut c_char;
    fn ovchat_free(value: *mut c_char);
}

/// The time in seconds in which rank 0 has to appear.
const APPEARS_WITHIN: i64 = 300;

/// A connection to the store.
#[derive(Debug)]
pub struct TcpStore {
    store: *mut c_void,
    /// The beginning of all keys: a store may outlive a run.
    prefix: String,
}

impl TcpStore {
    /// Connects to the store of rank 0, which serves it on the address that the launcher names and on no
    /// other.
    pub fn open(place: &RankPlace) -> Result<Self, ModelError> {
        let problem = |problem: String| ModelError::Torch {
            what: format!("opening the store at {}:{}", place.host, place.port),
            problem,
        };
        let listener = if place.is_server {
            let addresses = (place.host.as_str(), place.port).to_socket_addrs();
            let addresses: Vec<_> = addresses
                .map_err(|error| problem(error.to_string()))?
                .collect();
            let is_named = place.host == "localhost" || place.host.parse::<IpAddr>().is_ok();
            if !is_named && addresses.iter().all(|address| address.ip().is_loopback()) {
                let words = "this machine knows itself by a loopback address, which the others cannot reach; \
                             set MASTER_ADDR to its address in the network";
                return Err(problem(words.to_owned()));
            }
            let listener = TcpListener::bind(&*addresses);
            listener
                .map_err(|error| problem(error.to_string()))?
                .into_raw_fd()
        } else {
            -1
        };
        let host = text(&place.host);
        let mut store = null_mut();
        // SAFETY: `host` ends in a zero byte; `store` has room for a pointer.
        let message = unsafe {
            ovchat_store_open(
                &raw mut store,
                host.as_ptr(),
                place.port,
                listener,
                APPEARS_WITHIN,
            )
        };
        outcome(message).map_err(problem)?;
        Ok(Self {
            store,
            prefix: place.prefix.clone(),
        })
    }

    fn key(&self, key: &str) -> CString {
        text(&format!("{}/{key}", self.prefix))
    }
}

impl Board for TcpStore {
    fn add(&self, key: &str, by: i64) -> Result<i64, String> {
        let mut sum = 0;
        // SAFETY: the store is open; the key ends in a zero byte; `sum` has room for a number.
        outcome(unsafe { ovchat_store_add(self.store, self.key(key).as_ptr(), by, &raw mut sum) })?;
        Ok(sum)
    }

    fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
        let key = self.key(key);
        // SAFETY: the store is open; the key ends in a zero byte; `value` has `value.len()` bytes.
        outcome(unsafe { ovchat_store_set(self.store, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, String> {
        let key = self.key(key);
        let (mut value, mut size) = (null_mut(), 0);
        // SAFETY: the store is open; the key ends in a zero byte; `value` and `size` have room.
        outcome(unsafe {
            ovchat_store_get(self.store, key.as_ptr(), &raw mut value, &raw mut size)
        })?;
        if value.is_null() {
            return Ok(None);
        }
        // SAFETY: the shim has allocated `size` bytes and gave them away.
        let bytes = unsafe {
            let bytes = std::slice::from_raw_parts(value, size).to_vec();
            ovchat_free(value.cast());
            bytes
        };
        Ok(Some(bytes))
    }
}

impl Drop for TcpStore {
    fn drop(&mut self) {
        // SAFETY: `open` created it, and nothing else has it.
        unsafe { ovchat_store_close(self.store) };
    }
}

fn text(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

/// Takes over the message of a failed call, up to libtorch's stack trace.
fn outcome(message: *mut c_char) -> Result<(), String> {
    shim::outcome(message).map_err(|error| {
        let words = error.to_string();
        let first = words.split("\nException raised from").next();
        first.unwrap_or(&words).trim().to_owned()
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn two_ranks_see_the_same_numbers_and_values_until_rank_0_is_gone() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let place = |is_server: bool| RankPlace {
            rank: u32::from(!is_server),
            world: 2,
            host: "127.0.0.1".to_owned(),
            port,
            is_server,
            prefix: "first".to_owned(),
        };
        let first = TcpStore::open(&place(true)).unwrap();
        // It listens on no other address of this machine.
        assert!(TcpStream::connect(("127.0.0.2", port)).is_err());
        let second = TcpStore::open(&place(false)).unwrap();
        assert_eq!(first.add("n", 1), Ok(1));
        assert_eq!(second.add("n", 2), Ok(3));
        assert_eq!(second.get("value"), Ok(None));
        let large = vec![7; 1 << 20];
        first.set("value", &large).unwrap();
        assert_eq!(second.get("value"), Ok(Some(large)));
        first.set("empty", &[]).unwrap();
        assert_eq!(second.get("empty"), Ok(Some(Vec::new())));
        let other = TcpStore::open(&RankPlace {
            prefix: "second".to_owned(),
            ..place(false)
        });
        assert_eq!(other.unwrap().get("value"), Ok(None));
        drop(first);
        assert!(second.get("value").is_err());
    }
}
