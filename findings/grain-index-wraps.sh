#!/usr/bin/env bash
# grain 0.2.18 (Google's loader for JAX), numpy 2.4.6.
# Seen: a MapDataset has no end. ds[len(ds)] is no IndexError but the first element of the next epoch, and after
#   shuffle() the next epoch has an order of its own: ds[0] and ds[len(ds)] differ. After filter(), len() still counts
#   what was filtered out, and ds[i] is None there. Code that finds the end of a dataset by IndexError never does.
# A good guess: indices beyond the length raise, shuffle() is one fixed order, and filter() shortens.
# Output, 2026-11-28: range(5)[5] = 0, [12] = 2; shuffled epochs [5, 2, 3, 0, 4, 1] and [0, 4, 1, 2, 3, 5]; of 10, the
#   even ones: len 10, first four [0, None, 2, None]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check grain==0.2.18 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import grain

five = grain.MapDataset.range(5)
shuffled = grain.MapDataset.range(6).shuffle(seed=1)
epochs = [shuffled[i] for i in range(6)], [shuffled[i] for i in range(6, 12)]
even = grain.MapDataset.range(10).filter(lambda x: x % 2 == 0)
first = [even[i] for i in range(4)]
print(f'range(5)[5] = {five[5]}, [12] = {five[12]}; shuffled epochs {epochs[0]} and {epochs[1]}; '
      f'of 10, the even ones: len {len(even)}, first four {first}')
if (len(five), five[5], five[12]) != (5, 0, 2):
    raise SystemExit('An index beyond the length no longer wraps around.')
if epochs[0] == epochs[1] or sorted(epochs[0]) != list(range(6)) or sorted(epochs[1]) != list(range(6)):
    raise SystemExit('The second pass through the indices is no longer an epoch of another order.')
if len(even) != 10 or first != [0, None, 2, None] or len(list(even)) != 5:
    raise SystemExit('filter() no longer keeps the length, with None where an element was left out.')
PY
