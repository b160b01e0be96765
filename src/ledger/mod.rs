pub mod merkle;
pub mod note;
pub mod standing;
pub mod verify;
