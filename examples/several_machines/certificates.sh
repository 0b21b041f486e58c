#!/bin/bash
# Makes an authority of your own, and a certificate that it signs for each machine:
#
#     bash certificates.sh FOLDER HOST...
#
# Each machine gets ca.pem, its own HOST.pem and HOST.key, and no other key. HOST is what
# stands in TF_CONFIG, a name or an address. ca.key signs more of them: keep it at home.
set -euo pipefail
umask 077

folder=$1
shift
mkdir -p "$folder"
cd "$folder"

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 \
    -subj "/CN=swarm" -addext keyUsage=critical,keyCertSign -keyout ca.key -out ca.pem
for host in "$@"; do
    kind=DNS
    if [[ $host == *:* || $host =~ ^[0-9.]+$ ]]; then
        kind=IP
    fi
    extensions="subjectAltName=$kind:$host
authorityKeyIdentifier=keyid"
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
        -subj "/CN=$host" -keyout "$host.key" |
        openssl x509 -req -days 365 -CA ca.pem -CAkey ca.key -CAcreateserial \
            -extfile <(echo "$extensions") -out "$host.pem"
    openssl verify -x509_strict -CAfile ca.pem "$host.pem"
done
