# In Bochs, while it records: the guest moves its TSC; then that runs at $1 kHz, and the guest goes on.
in-guest moves
echo "$1" >"$SET_RATE"
while [ -e "$SET_RATE" ]; do sleep 0.1; done
in-guest rest
