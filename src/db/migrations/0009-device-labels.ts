import { Migration } from '@mikro-orm/migrations'

/**
 * Devices are found by their labels, by operators who list them and by lifecycle rules: without an index each time all are read.
 *
 * Made while devices go on to be written, which takes a second for a hundred thousand of them. One that was broken off leaves an
 * index that is of no use, and begins anew. The version before does not notice.
 */
export class DeviceLabels extends Migration {
  override isTransactional(): boolean {
    return false
  }

  override async up(): Promise<void> {
    this.addSql('drop index concurrently if exists devices_labels')
    this.addSql('create index concurrently devices_labels on devices using gin (labels jsonb_path_ops)')
  }

  override async down(): Promise<void> {
    this.addSql('drop index concurrently if exists devices_labels')
  }
}
