#!/bin/sh
# Makes what compose.yaml wants of the host: .env, secrets/ and models/. What is there already stays as it is.
set -eu
cd "$(dirname "$0")"
command -v openssl >/dev/null || { echo "prepare.sh wants openssl, which is not installed" >&2; exit 1; }

[ -e .env ] || cp .env.example .env
mkdir -p models secrets/hub_tokens/default
# Compose mounts the files as they are, for users of several containers: all may read them, but only who may enter the folder gets there.
chmod 700 secrets
umask 022
find secrets/hub_tokens -type d -exec chmod 755 {} +

random() { # NAME BYTES
    [ -s "secrets/$1" ] && return
    # Under its name only when it is whole.
    openssl rand -hex "$2" >secrets/.new || { echo "prepare.sh cannot make secrets/$1" >&2; exit 1; }
    mv -f secrets/.new "secrets/$1"
}
random s3_access_key 10
random s3_secret_key 32
random postgres_password 32
random token_secret 32
random grafana_password 16

# An authority for vLLM's port alone: gateway and agent trust it, and its key is gone when this ends. They want that name in the
# certificate, whatever the host is called. So one file that is missing means all three anew.
tls="secrets/vllm_ca secrets/vllm_tls_cert secrets/vllm_tls_key"
missing=
for file in $tls; do
    [ -s "$file" ] || missing="$missing $file"
done
if [ -n "$missing" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    new_key="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    # shellcheck disable=SC2086
    openssl req -x509 $new_key -days 3650 -subj "/CN=Finery vLLM authority" -keyout "$work/ca.key" -out "$work/ca.crt" 2>/dev/null
    # shellcheck disable=SC2086
    openssl req $new_key -subj "/CN=finery-vllm" -keyout "$work/key" -out "$work/request" 2>/dev/null
    printf 'subjectAltName=DNS:finery-vllm\nextendedKeyUsage=serverAuth\n' >"$work/extensions"
    openssl x509 -req -in "$work/request" -CA "$work/ca.crt" -CAkey "$work/ca.key" -CAcreateserial -days 3650 \
        -extfile "$work/extensions" -out "$work/crt" 2>/dev/null
    # Those that are there are read-only. All go first: a run that is cut off leaves one missing, and the next makes all of them.
    for file in $tls; do
        [ ! -e "$file" ] || echo "prepare.sh makes $file anew, because there is no$missing" >&2
    done
    # shellcheck disable=SC2086
    rm -f $tls
    cp "$work/ca.crt" secrets/vllm_ca
    cp "$work/crt" secrets/vllm_tls_cert
    cp "$work/key" secrets/vllm_tls_key
fi
find secrets -type f -exec chmod 444 {} +
