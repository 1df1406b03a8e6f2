# Make an authority, and a certificate for each daemon, in the volume of that daemon alone. What is there is kept.
set -eu
umask 022
cd /authority
[ -e ztna-ca ] || ztna ca init

issue() {
  name=$1
  shift
  [ ! -e "/to/$name/$name.pem" ] || return 0
  ztna ca issue "$name" "$@" --out "/to/$name"
  cp ztna-ca/ca.pem "/to/$name/"
  chown 65532:65532 "/to/$name"/*
}

issue relay --relay edge-1
issue connector --connector web-app --connector-id laptop
issue agent --agent web-app
