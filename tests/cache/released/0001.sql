-- A store of schema 0001, as the doratune of that schema wrote it.
BEGIN TRANSACTION;
CREATE TABLE doratune_binaries (
	id INTEGER NOT NULL, 
	source_digest TEXT NOT NULL, 
	kernel TEXT NOT NULL, 
	triton TEXT NOT NULL, 
	architecture TEXT NOT NULL, 
	metadata TEXT NOT NULL, 
	image BLOB NOT NULL, 
	CONSTRAINT pk_doratune_binaries PRIMARY KEY (id), 
	CONSTRAINT uq_doratune_binaries UNIQUE (source_digest, kernel, triton, architecture)
);
INSERT INTO "doratune_binaries" VALUES(1,'code-1','compose_kernel','3.7.1','sm_90','{"shared": 98304}',X'646F726174756E652D31006E3556C943F948BB115E9D8D7678FDDFF9C0E28989CCC3B4AE8F5283ECFDD46EFD377A585A000000FF12D9410200210116000000742FE5A30100057F454C4600FF00000000011606C9A57DD506729E7A010000000000595A');
CREATE TABLE doratune_entries (
	id INTEGER NOT NULL, 
	spec TEXT NOT NULL, 
	op TEXT NOT NULL, 
	d_out BIGINT NOT NULL, 
	d_in BIGINT NOT NULL, 
	rank BIGINT NOT NULL, 
	tokens BIGINT NOT NULL, 
	weight TEXT NOT NULL, 
	activation TEXT NOT NULL, 
	adapter TEXT NOT NULL, 
	magnitude TEXT NOT NULL, 
	bias BOOLEAN NOT NULL, 
	delta BOOLEAN NOT NULL, 
	save BOOLEAN NOT NULL, 
	gpu TEXT NOT NULL, 
	config TEXT NOT NULL, 
	template_digest TEXT NOT NULL, 
	source_digest TEXT NOT NULL, 
	source TEXT NOT NULL, 
	provenance TEXT NOT NULL, 
	us DOUBLE, 
	floor_us DOUBLE, 
	samples_us TEXT NOT NULL, 
	error DOUBLE, 
	registers BIGINT, 
	spills BIGINT, 
	shared_bytes BIGINT, 
	trials BIGINT NOT NULL, 
	tuned_gpu TEXT NOT NULL, 
	architecture TEXT NOT NULL, 
	triton TEXT NOT NULL, 
	torch TEXT NOT NULL, 
	driver TEXT NOT NULL, 
	gpu_name TEXT NOT NULL, 
	doratune TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	CONSTRAINT pk_doratune_entries PRIMARY KEY (id), 
	CONSTRAINT uq_doratune_entries UNIQUE (spec)
);
INSERT INTO "doratune_entries" VALUES(1,'lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200','lora_compose',4096,0,384,4096,'','bf16','bf16','',0,0,0,'h200','{"block_n": 128, "block_t": 64, "num_stages": 3, "num_warps": 4, "variant": "tile"}','template-1','source-1','"""A kernel: g ⊙ (base + s·hBᵀ).

lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200"""
y = 1
','measured',20.0,16.0,'[19.5, 20.0, 21.25]',0.0015,128,0,98304,40,'h200','sm_90','3.7.1','2.13.0','580.1','NVIDIA H200','0.1.0','2026-11-23T10:00:00+00:00');
INSERT INTO "doratune_entries" VALUES(2,'lora_compose/d_out=4096/rank=384/tokens=16/activation=bf16/adapter=bf16/bias@h100','lora_compose',4096,0,384,16,'','bf16','bf16','',1,0,0,'h100','{"block_n": 128, "block_t": 64, "num_stages": 3, "num_warps": 4, "variant": "tile"}','template-1','source-1','"""A kernel: g ⊙ (base + s·hBᵀ).

lora_compose/d_out=4096/rank=384/tokens=16/activation=bf16/adapter=bf16/bias@h100"""
y = 1
','predicted',20.0,16.0,'[]',0.0015,128,0,98304,40,'h100','sm_90','3.7.1','2.13.0','580.1','','0.1.0','2026-11-23T10:00:00+00:00');
CREATE TABLE doratune_schema (
	version_num VARCHAR(32) NOT NULL, 
	PRIMARY KEY (version_num)
);
INSERT INTO "doratune_schema" VALUES('0001');
CREATE INDEX ix_doratune_entries_source_digest ON doratune_entries (source_digest);
CREATE INDEX ix_doratune_entries_op_gpu ON doratune_entries (op, gpu);
CREATE INDEX ix_doratune_entries_op_architecture ON doratune_entries (op, architecture);
COMMIT;
