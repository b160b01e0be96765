//! grpc.health.v1: the whole (""), and each dependency (`hsm`, `ledger`).

use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

/// What is reported, and the service that reports it.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
}

impl Default for Health {
    fn default() -> Self {
        Self { reporter: HealthReporter::new() }
    }
}

impl Health {
    pub(super) fn service(&self) -> HealthServer<HealthService> {
        HealthServer::new(HealthService::from_health_reporter(self.reporter.clone()))
    }

    /// Says how the dependencies are. The whole serves while all of them do.
    pub async fn report(&self, hsm: bool, ledger: bool, rest: bool) {
        let status = |well| if well { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status("hsm", status(hsm)).await;
        self.reporter.set_service_status("ledger", status(ledger)).await;
        self.reporter.set_service_status("", status(hsm && ledger && rest)).await;
    }
}
