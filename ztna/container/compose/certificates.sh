# Make an authority, and a certificate for each daemon, in the volume of that daemon alone. What is there is kept.
set -eu
umask 022
cd /authority
[ -e ztna-ca ] || ztna ca init

issue() {
  name=$1
  shift
  [ ! -e "/to/$name/ca.pem" ] || return 0
  rm -f "/to/$name/$name.pem" "/to/$name/$name.key"
  ztna ca issue "$name" "$@" --out "/to/$name"
  chown 65532:65532 "/to/$name"/*
  # The last of them: what was begun and not ended is made anew.
  cp ztna-ca/ca.pem "/to/$name/"
}

issue relay --relay edge-1
issue connector --connector web-app --connector-id laptop
issue agent --agent web-app
