//! What every device carries under an assignment, and how one move changes that.

use super::clusters::Clusters;
use super::problem::Devices;

/// An assignment with the load of every device, kept up to date.
///
/// Devices are numbered: accelerators first, then hosts. Moving a cluster changes the loads of the two devices
/// concerned and no other: a third device that holds a part of a net still does not hold all of it.
#[derive(Clone, Debug)]
pub struct Loads<'a> {
    shape: &'a Shape,
    device: Vec<u32>,
    /// Clusters of a net on a device: net major.
    held: Vec<u32>,
    load: Vec<f64>,
    bytes: Vec<f64>,
    n_clusters: Vec<u32>,
}

/// Clusters laid out for fast moves.
#[derive(Clone, Debug)]
pub struct Shape {
    pub n_devices: usize,
    pub n_accelerators: usize,
    pub memory: f64,
    /// Time on an accelerator, time on a host, bytes.
    accelerator: Vec<f64>,
    host: Vec<f64>,
    bytes: Vec<f64>,
    cost: Vec<f64>,
    size: Vec<u32>,
    nets_begin: Vec<u32>,
    nets: Vec<u32>,
    pins_begin: Vec<u32>,
    pins: Vec<u32>,
}

impl Shape {
    pub fn new(clusters: &Clusters, devices: Devices) -> Self {
        let list = |lists: &mut dyn Iterator<Item = &Vec<usize>>| {
            let (mut begin, mut flat) = (vec![0_u32], Vec::new());
            for list in lists {
                flat.extend(list.iter().map(|&i| i as u32));
                begin.push(flat.len() as u32);
            }
            (begin, flat)
        };
        let (nets_begin, nets) = list(&mut clusters.nets_of().iter());
        let (pins_begin, pins) = list(&mut clusters.nets.iter().map(|(_, pins)| pins));
        Self {
            n_devices: devices.n_accelerators + devices.n_hosts,
            n_accelerators: devices.n_accelerators,
            memory: devices.memory,
            accelerator: clusters.accelerator.clone(),
            host: clusters.host.clone(),
            bytes: clusters.bytes.clone(),
            cost: clusters.nets.iter().map(|(cost, _)| *cost).collect(),
            size: clusters.nets.iter().map(|(_, pins)| pins.len() as u32).collect(),
            nets_begin,
            nets,
            pins_begin,
            pins,
        }
    }

    pub fn len(&self) -> usize {
        self.host.len()
    }

    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }

    pub fn nets_of(&self, cluster: usize) -> &[u32] {
        &self.nets[self.nets_begin[cluster] as usize..self.nets_begin[cluster + 1] as usize]
    }

    pub fn pins_of(&self, net: usize) -> &[u32] {
        &self.pins[self.pins_begin[net] as usize..self.pins_begin[net + 1] as usize]
    }

    pub fn accelerated(&self, device: usize) -> bool {
        device < self.n_accelerators
    }

    /// Whether a device can hold more than its memory at all.
    pub fn memory_binds(&self) -> bool {
        self.bytes.iter().sum::<f64>() > self.memory
    }

    /// Time of a cluster by itself.
    pub fn time(&self, cluster: usize, device: usize) -> f64 {
        if self.accelerated(device) { self.accelerator[cluster] } else { self.host[cluster] }
    }

    pub fn bytes(&self, cluster: usize) -> f64 {
        self.bytes[cluster]
    }

    pub fn cost(&self, net: usize) -> f64 {
        self.cost[net]
    }
}

impl<'a> Loads<'a> {
    pub fn new(shape: &'a Shape, device: &[u32]) -> Self {
        let n = shape.n_devices;
        let mut out = Self {
            shape,
            device: device.to_vec(),
            held: vec![0; shape.cost.len() * n],
            load: vec![0.0; n],
            bytes: vec![0.0; n],
            n_clusters: vec![0; n],
        };
        for (cluster, &d) in device.iter().enumerate() {
            out.n_clusters[d as usize] += 1;
            for &net in shape.nets_of(cluster) {
                out.held[net as usize * n + d as usize] += 1;
            }
        }
        out.recount();
        out
    }

    /// Sums loads and bytes anew: many moves leave rounding errors.
    pub fn recount(&mut self) {
        let (shape, n) = (self.shape, self.shape.n_devices);
        self.load.fill(0.0);
        self.bytes.fill(0.0);
        for (cluster, &d) in self.device.iter().enumerate() {
            self.load[d as usize] += shape.time(cluster, d as usize);
            self.bytes[d as usize] += shape.bytes[cluster];
        }
        for (net, held) in self.held.chunks_exact(n.max(1)).enumerate() {
            for (load, &held) in self.load[..shape.n_accelerators].iter_mut().zip(held) {
                if held > 0 && held < shape.size[net] {
                    *load += shape.cost[net];
                }
            }
        }
    }

    pub fn device(&self, cluster: usize) -> usize {
        self.device[cluster] as usize
    }

    pub fn assignment(&self) -> &[u32] {
        &self.device
    }

    pub fn load(&self, device: usize) -> f64 {
        self.load[device]
    }

    pub fn bytes(&self, device: usize) -> f64 {
        self.bytes[device]
    }

    pub fn n_clusters(&self, device: usize) -> usize {
        self.n_clusters[device] as usize
    }

    /// Load of the busiest device.
    pub fn worst(&self) -> f64 {
        self.load.iter().copied().fold(0.0, f64::max)
    }

    /// No accelerator holds more than its memory.
    pub fn fits(&self) -> bool {
        self.bytes[..self.shape.n_accelerators].iter().all(|&b| b <= self.shape.memory)
    }

    /// What the move adds to the load of the device left and to that of the device entered.
    #[inline]
    pub fn change(&self, cluster: usize, to: usize) -> (f64, f64) {
        let (shape, n) = (self.shape, self.shape.n_devices);
        let from = self.device[cluster] as usize;
        let (mut left, mut entered) = (-shape.time(cluster, from), shape.time(cluster, to));
        let (left_pays, entered_pays) = (shape.accelerated(from), shape.accelerated(to));
        for &net in shape.nets_of(cluster) {
            let net = net as usize;
            let (cost, size) = (shape.cost[net], shape.size[net]);
            let (a, b) = (self.held[net * n + from], self.held[net * n + to]);
            // The device left: paid while it held some but not all.
            if a == size {
                if left_pays {
                    left += cost;
                }
            } else if a == 1 && left_pays {
                left -= cost;
            }
            if b == 0 {
                if entered_pays {
                    entered += cost;
                }
            } else if b + 1 == size && entered_pays {
                entered -= cost;
            }
        }
        (left, entered)
    }

    /// Moves a cluster; `change` is what [`Self::change`] says of this move.
    pub fn apply(&mut self, cluster: usize, to: usize, change: (f64, f64)) {
        let n = self.shape.n_devices;
        let from = self.device[cluster] as usize;
        self.load[from] += change.0;
        self.load[to] += change.1;
        self.bytes[from] -= self.shape.bytes[cluster];
        self.bytes[to] += self.shape.bytes[cluster];
        self.n_clusters[from] -= 1;
        self.n_clusters[to] += 1;
        self.device[cluster] = to as u32;
        for &net in self.shape.nets_of(cluster) {
            let at = net as usize * n;
            self.held[at + from] -= 1;
            self.held[at + to] += 1;
        }
    }
}
