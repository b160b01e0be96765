# Shared by the scripts beside it: where things are, steps with their time, packages.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# What is built is looked for there, wherever else cargo was told to put it.
export CARGO_TARGET_DIR="$PWD/target"
unset CARGO_BUILD_TARGET
export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-never}"

# step NAME COMMAND...: runs it and prints how long it took; ends the script if it fails.
step() {
    local name=$1 from
    shift
    from=$(date +%s%N)
    printf '\n== %s\n' "$name"
    local code=0
    # Not behind `if` or `||`: that would switch `set -e` off inside shell functions.
    set +e
    (
        set -e
        "$@"
    )
    code=$?
    set -e
    printf '== %s: %s s, exit %d\n' "$name" "$(seconds_since "$from")" "$code"
    return "$code"
}

seconds_since() {
    local tenths=$((($(date +%s%N) - $1) / 100000000))
    printf '%d.%d' $((tenths / 10)) $((tenths % 10))
}

# need COMMAND PACKAGE: installs PACKAGE unless COMMAND (or a file of that path) is there.
need() {
    command -v "$1" >/dev/null 2>&1 || [ -e "$1" ] || apt_install "$2"
}

apt_install() {
    local as=()
    [ "$(id -u)" -eq 0 ] || as=(sudo)
    export DEBIAN_FRONTEND=noninteractive
    # Old package lists are fetched anew only if they do not serve.
    "${as[@]}" apt-get install -y -q --no-install-recommends "$@" ||
        { "${as[@]}" apt-get update -q && "${as[@]}" apt-get install -y -q --no-install-recommends "$@"; }
}

need_rust_tools() {
    command -v cargo >/dev/null || { echo "install Rust first: https://rustup.rs (stable, see rust-version in Cargo.toml)" >&2; exit 1; }
    need cc build-essential
}
