//! Priority queues of vertices whose priorities change.

const ABSENT: (u32, u32) = (u32::MAX, u32::MAX);

type Entry = (i64, u32, u32);

/// Binary heaps, one for each block, with the place of every vertex: highest gain first, among equals the one touched
/// last (Hagen, Huang and Kahng, "On implementation choices for iterative improvement partitioning algorithms", 1997:
/// that order cuts less).
#[derive(Clone, Debug, Default)]
pub(super) struct Queues {
    heaps: Vec<Vec<Entry>>,
    /// Heaps in use, in the order in which they were first used.
    used: Vec<u32>,
    /// Heap and position of each vertex.
    place: Vec<(u32, u32)>,
    stamp: u32,
}

impl Queues {
    pub fn new(n_vertices: usize, n_queues: usize) -> Self {
        Self { heaps: vec![Vec::new(); n_queues], used: Vec::new(), place: vec![ABSENT; n_vertices], stamp: 0 }
    }

    pub fn clear(&mut self) {
        for q in self.used.drain(..) {
            for (_, _, v) in self.heaps[q as usize].drain(..) {
                self.place[v as usize] = ABSENT;
            }
        }
        self.stamp = 0;
    }

    pub fn contains(&self, v: u32) -> bool {
        self.place[v as usize] != ABSENT
    }

    /// Inserts a vertex, or changes its queue or gain.
    pub fn set(&mut self, v: u32, q: u32, gain: i64) {
        self.stamp = self.stamp.wrapping_add(1);
        let entry = (gain, self.stamp, v);
        let (old_q, at) = self.place[v as usize];
        if old_q == q {
            let heap = &mut self.heaps[q as usize];
            let at = at as usize;
            let above = at == 0 || key(&heap[(at - 1) / 2]) >= key(&entry);
            if above {
                sink(heap, &mut self.place, q, at, entry)
            } else {
                rise(heap, &mut self.place, q, at, entry)
            }
            return;
        }
        self.remove(v);
        let heap = &mut self.heaps[q as usize];
        if heap.is_empty() && !self.used.contains(&q) {
            self.used.push(q);
        }
        heap.push(entry);
        let at = heap.len() - 1;
        rise(heap, &mut self.place, q, at, entry);
    }

    pub fn remove(&mut self, v: u32) {
        let (q, at) = self.place[v as usize];
        if (q, at) == ABSENT {
            return;
        }
        self.place[v as usize] = ABSENT;
        let heap = &mut self.heaps[q as usize];
        let Some(last) = heap.pop() else { return };
        if last.2 != v {
            // The last entry may belong above or below the gap.
            let at = at as usize;
            let above = at == 0 || key(&heap[(at - 1) / 2]) >= key(&last);
            if above { sink(heap, &mut self.place, q, at, last) } else { rise(heap, &mut self.place, q, at, last) }
        }
    }

    /// The best vertex at the head of a queue, among heads that `may` move to that queue's block.
    pub fn best(&self, may: impl Fn(u32, u32) -> bool) -> Option<(i64, u32, u32)> {
        let heads = self.used.iter().filter_map(|&q| self.heaps[q as usize].first().map(|e| (e.0, e.1, q, e.2)));
        heads.filter(|&(_, _, q, v)| may(v, q)).max().map(|(gain, _, q, v)| (gain, q, v))
    }
}

fn key(entry: &Entry) -> (i64, u32) {
    (entry.0, entry.1)
}

fn rise(heap: &mut [Entry], place: &mut [(u32, u32)], q: u32, mut at: usize, entry: Entry) {
    while at > 0 {
        let parent = (at - 1) / 2;
        let above = heap[parent];
        if key(&above) >= key(&entry) {
            break;
        }
        heap[at] = above;
        place[above.2 as usize] = (q, at as u32);
        at = parent;
    }
    heap[at] = entry;
    place[entry.2 as usize] = (q, at as u32);
}

fn sink(heap: &mut [Entry], place: &mut [(u32, u32)], q: u32, mut at: usize, entry: Entry) {
    loop {
        let mut child = 2 * at + 1;
        if child >= heap.len() {
            break;
        }
        if child + 1 < heap.len() && key(&heap[child + 1]) > key(&heap[child]) {
            child += 1;
        }
        let below = heap[child];
        if key(&below) <= key(&entry) {
            break;
        }
        heap[at] = below;
        place[below.2 as usize] = (q, at as u32);
        at = child;
    }
    heap[at] = entry;
    place[entry.2 as usize] = (q, at as u32);
}
