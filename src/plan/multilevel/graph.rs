//! An undirected graph with weights on vertices and edges, as rows of neighbours.

/// Rows of neighbours that are no undirected graph.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidGraph {
    #[error("{n_starts} row offsets and {n_neighbours} neighbours do not fit {n_vertices} vertices")]
    Lengths { n_vertices: usize, n_starts: usize, n_neighbours: usize },
    #[error("neighbour {neighbour} of vertex {vertex} is not below {n_vertices}")]
    OutOfRange { vertex: u32, neighbour: u32, n_vertices: usize },
    #[error("vertex {vertex} is a neighbour of itself; leave such edges out")]
    SelfLoop { vertex: u32 },
    #[error("weight {weight} at vertex {vertex} is not allowed: edges weigh at least 1, vertices at least 0")]
    Weight { vertex: u32, weight: i64 },
    #[error("weights add up to more than 2^61; scale them down")]
    TooHeavy,
    #[error("the edge between {vertex} and {neighbour} differs at its two ends; list it in both rows with one weight")]
    Asymmetric { vertex: u32, neighbour: u32 },
}

/// Neighbours of vertex v: `to[starts[v]..starts[v + 1]]`, with weights at the same positions. Every edge stands in
/// two rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weighted {
    starts: Vec<usize>,
    to: Vec<u32>,
    edge: Vec<i64>,
    vertex: Vec<i64>,
}

impl Weighted {
    /// Checks rows of neighbours and takes them over.
    ///
    /// # Shapes
    /// `starts`: n + 1 offsets into `to`; `edge`: as long as `to`; `vertex`: n weights.
    /// # Errors
    /// [`InvalidGraph`] for lengths that disagree, neighbours out of range, self-loops, negative or huge weights, and
    /// edges that are not listed the same way at both ends.
    pub fn new(starts: Vec<usize>, to: Vec<u32>, edge: Vec<i64>, vertex: Vec<i64>) -> Result<Self, InvalidGraph> {
        let n = vertex.len();
        let grows = starts.first() == Some(&0) && starts.is_sorted();
        if !grows || starts.len() != n + 1 || starts[n] != to.len() || to.len() != edge.len() || n >= u32::MAX as usize
        {
            return Err(InvalidGraph::Lengths { n_vertices: n, n_starts: starts.len(), n_neighbours: to.len() });
        }
        // Sums and gains stay below a quarter of what 64 bits hold.
        let limit = i128::from(i64::MAX / 4);
        let sum = |weights: &[i64]| weights.iter().map(|&w| i128::from(w)).sum::<i128>();
        if sum(&vertex) > limit || sum(&edge) > limit {
            return Err(InvalidGraph::TooHeavy);
        }
        let graph = Self { starts, to, edge, vertex };
        for v in 0..n as u32 {
            if graph.vertex_weight(v) < 0 {
                return Err(InvalidGraph::Weight { vertex: v, weight: graph.vertex_weight(v) });
            }
            for (u, w) in graph.neighbours(v) {
                if u as usize >= n {
                    return Err(InvalidGraph::OutOfRange { vertex: v, neighbour: u, n_vertices: n });
                }
                if u == v {
                    return Err(InvalidGraph::SelfLoop { vertex: v });
                }
                if w < 1 {
                    return Err(InvalidGraph::Weight { vertex: v, weight: w });
                }
            }
        }
        graph.check_symmetry()?;
        Ok(graph)
    }

    /// Parts that are known to fit together.
    pub(super) fn trusted(starts: Vec<usize>, to: Vec<u32>, edge: Vec<i64>, vertex: Vec<i64>) -> Self {
        debug_assert!(starts.len() == vertex.len() + 1 && to.len() == edge.len() && starts[vertex.len()] == to.len());
        Self { starts, to, edge, vertex }
    }

    /// Both ends list the same edges: the transposed rows, sorted, equal the rows, sorted.
    fn check_symmetry(&self) -> Result<(), InvalidGraph> {
        let n = self.n_vertices();
        let mut next = vec![0usize; n + 1];
        for &u in &self.to {
            next[u as usize + 1] += 1;
        }
        for v in 0..n {
            next[v + 1] += next[v];
        }
        let mut transposed = vec![(0u32, 0i64); self.to.len()];
        let begins = next.clone();
        for v in 0..n as u32 {
            for (u, w) in self.neighbours(v) {
                transposed[next[u as usize]] = (v, w);
                next[u as usize] += 1;
            }
        }
        let mut row = Vec::new();
        for v in 0..n as u32 {
            row.clear();
            row.extend(self.neighbours(v));
            row.sort_unstable();
            let back = &mut transposed[begins[v as usize]..begins[v as usize + 1]];
            back.sort_unstable();
            if row != back {
                let odd = row.iter().zip(back.iter()).find(|(a, b)| a != b).map_or_else(
                    || if row.len() > back.len() { row[back.len()].0 } else { back[row.len()].0 },
                    |(a, b)| a.0.min(b.0),
                );
                return Err(InvalidGraph::Asymmetric { vertex: v, neighbour: odd });
            }
        }
        Ok(())
    }

    pub fn n_vertices(&self) -> usize {
        self.vertex.len()
    }

    pub fn n_edges(&self) -> usize {
        self.to.len() / 2
    }

    pub fn vertex_weight(&self, v: u32) -> i64 {
        self.vertex[v as usize]
    }

    pub fn total_weight(&self) -> i64 {
        self.vertex.iter().sum()
    }

    pub fn degree(&self, v: u32) -> usize {
        self.starts[v as usize + 1] - self.starts[v as usize]
    }

    /// Each neighbour with the weight of the edge to it.
    pub fn neighbours(&self, v: u32) -> impl Iterator<Item = (u32, i64)> + '_ {
        let row = self.starts[v as usize]..self.starts[v as usize + 1];
        self.to[row.clone()].iter().copied().zip(self.edge[row].iter().copied())
    }

    /// Weight of the edges whose ends are in different blocks.
    pub fn cut(&self, blocks: &[u32]) -> i64 {
        let ends = |v: u32| self.neighbours(v).filter(move |&(u, _)| blocks[u as usize] != blocks[v as usize]);
        (0..self.n_vertices() as u32).flat_map(|v| ends(v).map(|(_, w)| w)).sum::<i64>() / 2
    }

    /// The graph among `vertices` (ascending), whose new numbers are their positions.
    pub(super) fn induced(&self, vertices: &[u32], number: &mut [u32]) -> Self {
        const OUT: u32 = u32::MAX;
        for (i, &v) in vertices.iter().enumerate() {
            number[v as usize] = i as u32;
        }
        let mut starts = Vec::with_capacity(vertices.len() + 1);
        starts.push(0);
        let (mut to, mut edge) = (Vec::new(), Vec::new());
        for &v in vertices {
            for (u, w) in self.neighbours(v) {
                if number[u as usize] != OUT {
                    to.push(number[u as usize]);
                    edge.push(w);
                }
            }
            starts.push(to.len());
        }
        for &v in vertices {
            number[v as usize] = OUT;
        }
        let vertex = vertices.iter().map(|&v| self.vertex[v as usize]).collect();
        Self::trusted(starts, to, edge, vertex)
    }
}
