#!/bin/sh
# Runs once before anything starts: gives the volumes to the user that everything else runs as, and sees that the base model is there.
#
#   init.sh MODEL FOLDER...
#
# MODEL is a folder or a hub id; an id is fetched into HF_HOME, so that vLLM needs no way out. CLAAS_UID is the user, 2000 if unset.
# Started as that user rather than as root it changes no owners.
set -eu

[ "$#" -ge 2 ] || { echo "usage: $0 MODEL FOLDER..." >&2; exit 2; }
model=$1
shift
uid=${CLAAS_UID:-2000}

say() { echo "init: $*"; }
fail() { echo "init: $*" >&2; exit 1; }

as_user() {
  if [ "$(id -u)" -eq 0 ]; then setpriv --reuid="$uid" --regid="$uid" --clear-groups -- "$@"; else "$@"; fi
}

for folder in "$@"; do
  mkdir -p "$folder"
  if [ "$(id -u)" -eq 0 ] && [ -n "$(find "$folder" ! -uid "$uid" -print -quit)" ]; then
    chown -R "$uid:$uid" "$folder"
    say "$folder now belongs to user $uid"
  fi
  as_user test -w "$folder" || fail "user $uid cannot write to $folder: give it the folder, or mount another"
done

case $model in
  /*)
    as_user test -r "$model/config.json" || fail "user $uid finds no config.json in $model: mount a model's folder there and let everyone read it"
    ;;
  */*)
    # What only other programs read is left out. With HF_HUB_OFFLINE=1 this only looks whether all is there.
    as_user env HOME=/tmp hf download --quiet "$model" --exclude 'original/*' --exclude '*.pth' --exclude '*.gguf' --exclude '*.onnx' >/dev/null ||
      fail "$model could not be fetched: check its name and the network, and set HF_TOKEN if it is gated"
    ;;
  *)
    fail "'$model' is neither a hub id (owner/name) nor a folder (/path)"
    ;;
esac
say "$model is ready"
