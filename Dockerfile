# One static-ish binary on a base of your choice. Builds offline from a binary that is already there:
#   cargo build --release && docker build --build-arg BASE=debian:bookworm-slim -t foreshard .
ARG BASE=debian:bookworm-slim
FROM ${BASE}
COPY --chmod=0755 target/release/foreshard /usr/local/bin/foreshard
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/foreshard"]
