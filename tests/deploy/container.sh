#!/bin/sh
# Runs a command as a container engine would: PID 1 of its own, a read-only root without /tmp, one volume, a user's number
# that no file of this machine belongs to, ports of its own.
# Usage: unshare --mount --net --pid --fork container.sh ROOT VENV VOLUME USER COMMAND...
set -eu
root=$1 venv=$2 volume=$3 user=$4
shift 4
mount --make-rprivate /
ip link set lo up
mount -t tmpfs tmpfs "$root"
python=$("$venv/bin/python" -c 'import sys; print(sys.base_prefix)')
for directory in /bin /dev /etc /lib /lib64 /usr "$python" "$venv"; do
  [ -d "$directory" ] || continue
  mkdir -p "$root$directory"
  mount --rbind "$directory" "$root$directory"
done
mkdir -p "$root/proc" "$root/var/lib/tailspan"
mount -t proc proc "$root/proc"
mount --bind "$volume" "$root/var/lib/tailspan"
mount -o remount,ro "$root"
exec chroot --userspec="$user" "$root" "$@"
