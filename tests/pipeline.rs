//! A model cut by layers over two workers answers like one worker, to the bit.

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use tercet_proto::v1::{TokenIds, generate_request::Input};
use tercet_tests::{Client, Etcd, FEATURES, Reference, Tercet, sampled};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_stages_answer_like_one_worker() -> Result<()> {
    let Some(etcd) = Etcd::start()? else { return Ok(()) };
    let url = etcd.url();
    let cluster = ["--etcd", &url, "--cluster", "pipeline", "--listen", "127.0.0.1:0"];
    let stage = |layers| {
        Tercet::start(["worker", "--threads", "1", "--layers", layers].iter().chain(&cluster))
    };
    let (head, _tail) = (stage("0..1")?, stage("1..3")?);
    let gateway = Tercet::start(["gateway"].iter().chain(&cluster))?;
    head.serving().await?;
    gateway.serving().await?;
    let whole = Tercet::start(["serve", "--listen", "127.0.0.1:0", "--threads", "2"])?;
    whole.serving().await?;

    let cut = Client::connect(gateway.address()).await?;
    let whole = Client::connect(whole.address()).await?;
    ensure!(cut.models().await? == whole.models().await?, "one identity");
    let ids = whole.tokenize("Enter ROMEO and JULIET.\n\nROMEO.\nBut soft! what light").await?;
    let (a, b) = (cut.score(ids.clone()).await?, whole.score(ids.clone()).await?);
    let bits = |logprobs: &[f32]| logprobs.iter().map(|l| l.to_bits()).collect::<Vec<_>>();
    ensure!(bits(&a.logprobs) == bits(&b.logprobs) && a.top_ids == b.top_ids);
    ensure!(a.logprobs.len() == ids.len() - 1);

    let requests =
        (0..4).map(|seed| sampled(Input::Tokens(TokenIds { ids: ids.clone() }), seed, 200));
    let of_cut = requests.clone().map(|request| cut.generate(request));
    let of_cut = try_join_all(of_cut).await?;
    for (request, got) in requests.zip(of_cut) {
        let expected = whole.generate(request).await?;
        ensure!(got == expected, "{got:?}\nis not {expected:?}");
    }

    let mut references = Vec::new();
    for (seed, (_, apply)) in (0..).zip(FEATURES) {
        let mut request = sampled(Input::Tokens(TokenIds { ids: ids.clone() }), seed, 60);
        apply(&mut request);
        let reference = Reference::ask(&whole, request).await?;
        let indices = reference.resumable();
        references.push(reference.resumed(indices[indices.len() / 2]).1);
        references.push(reference);
    }
    try_join_all(references.iter().map(|reference| reference.repeat(&cut))).await?;
    Ok(())
}
