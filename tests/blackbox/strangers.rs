//! Strangers: whoever reaches the port and has no certificate takes nothing from those who have one.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::{TcpSocket, TcpStream};

use crate::house::House;

/// Another source than the house's own.
async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind("127.0.0.2:0".parse().unwrap())?;
    socket.connect(address).await
}

#[test]
fn connections_that_say_nothing_keep_no_agent_out() {
    let house = House::new().configured("limits", "connections = 8").initialised().served();
    let agent = house.attested("builder/1");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let held: Vec<TcpStream> = runtime.block_on(async {
        let mut held = Vec::new();
        for _ in 0..40 {
            held.extend(connect(house.address()).await.ok());
        }
        held
    });
    let begun = Instant::now();
    agent.renew().ok();
    // A handshake has five seconds: the places were not waited for.
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    drop(held);
}
