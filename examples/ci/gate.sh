#!/usr/bin/env bash
# Evaluates a candidate checkpoint and holds it against a baseline's run. Ends with the gate's exit code:
# 0 pass, 1 fail, 2 cannot decide (or a wrong call).
#
#   CHECKPOINT=checkpoints/new BASELINE=runs/main examples/ci/gate.sh
#
# TASKS   what is asked (default: all three sets)
# POLICY  YAML of what may be lost (default: the one that comes with stllava-eval)
# OUT     where run and reports go (default: gate)
# RUN     a run of the candidate that is there already; nothing is answered then
set -euo pipefail
: "${BASELINE:?set BASELINE to the run folder that the candidate has to live up to}"
OUT=${OUT:-gate}
mkdir -p "$OUT"

if [ -z "${RUN:-}" ]; then
  : "${CHECKPOINT:?set CHECKPOINT to what is evaluated, or RUN to a run of it}"
  RUN=$OUT/run
  stllava-eval run --tasks "${TASKS:-vqarad,slake,pathvqa}" --checkpoint "$CHECKPOINT" --out "$RUN"
fi

code=0
stllava-eval gate "$RUN" --baseline "$BASELINE" ${POLICY:+--policy "$POLICY"} --out "$OUT" || code=$?
# the page shows what changed, question by question; a run that cannot be shown must not hide the verdict
stllava-eval leaderboard "$BASELINE" "$RUN" --out "$OUT/page" > /dev/null || echo "no page: see the line above" >&2
exit "$code"
